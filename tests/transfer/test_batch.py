"""A list of repositories, every tenth of which has a fault."""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.cli.helpers import SCRIPT
from tests.transfer.helpers import README, TOKEN, mirrored, user
from tests.transfer.servers import DestinationServer, SourceServer, listed_sha256

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.transfer.result import TransferResult
    from emb_model_provider.transfer.transfer import Transfer

FAULTS = ("dropped", "wrong hash", "403", "404", "rate limit", "gated", "license", "no write access", "escape", "wait")
CODES = {
    "dropped": "hub_unavailable",
    "wrong hash": "corrupt_files",
    "403": "hub_access_denied",
    "404": "repository_not_found",
    "rate limit": "hub_unavailable",
    "gated": "permission_required",
    "license": "license_required",
    "no write access": "hub_access_denied",
    "escape": "corrupt_files",
    "wait": "hub_unavailable",
}
"""The code of the error of each fault."""


def fault_of(number: int) -> str | None:
    return FAULTS[number // 10 % len(FAULTS)] if number % 10 == 3 else None


def fill(source: SourceServer, count: int) -> str:
    """Add the repositories to the source, and return the list."""
    lines = ["# repositories"]
    for number in range(count):
        source.repos[f"acme/m{number}"] = {
            "README.md": README,
            "config.json": b'{"n": %d}' % number,
            f"w{number}.safetensors": b"%d" % number * 20_000,
        }
        lines.append(f"acme/m{number} mirrors/m{number}")
    return "\n".join(lines) + "\n"


def break_some(source: SourceServer, destination: DestinationServer) -> None:
    for number in range(len(source.repos)):
        repo, weights = f"acme/m{number}", f"w{number}.safetensors"
        sha256 = listed_sha256(source.repos[repo][weights])
        match fault_of(number):
            case "dropped":
                destination.uploads.drop_put_after[sha256] = [100] * 5
            case "wrong hash":
                source.faults.wrong_bytes[weights] = 2
            case "403":
                source.refused[f"{repo}/"] = (403, "")
            case "404":
                source.refused[f"{repo}/"] = (404, "RepoNotFound")
            case "rate limit":
                destination.uploads.statuses[sha256] = [(429, {"Retry-After": "0"})] * 5
            case "wait":
                destination.uploads.statuses[sha256] = [(429, {"Retry-After": "86400"})]
            case "gated":
                source.info[repo] = {"gated": "manual", "cardData": {"license": "mit"}}
            case "license":
                source.info[repo] = {"cardData": {"license": None}}
                source.repos[repo]["README.md"] = b"# no license\n"
            case "no write access":
                destination.denied.add(f"mirrors/m{number}")
            case "escape":
                source.repos[repo]["x.txt"] = b"x"
                source.repos[repo]["../x.txt"] = b"x"


def repair(source: SourceServer, destination: DestinationServer) -> None:
    """Remove the faults that do not go away by themselves, except for those that options of the command are for."""
    source.refused.clear()
    destination.denied.clear()
    for files in source.repos.values():
        files.pop("../x.txt", None)


@pytest.mark.parametrize("count", [100, pytest.param(200, marks=pytest.mark.slow)])
def test_a_batch_with_faults_transfers_the_rest_and_a_second_run_finishes(
    count: int, transfer: Callable[..., Transfer], source: SourceServer, destination: DestinationServer, tmp_path: Path
) -> None:
    """Each repository with a fault is named with its reason, and nothing of it is committed."""
    path = tmp_path / "list.txt"
    source.repos.clear()
    path.write_text(fill(source, count))
    break_some(source, destination)
    seen: list[TransferResult] = []
    first = transfer().run_batch(path, on_result=seen.append)
    assert seen == first
    for number, result in enumerate(first):
        fault = fault_of(number)
        assert result.error_code == (CODES[fault] if fault else None), (fault, result.error)
        assert result.state == ("failed" if fault else "done")
        if fault:
            assert f"m{number}" in f"{result.source} {result.error}"
        else:
            assert mirrored(source, destination, f"acme/m{number}", f"mirrors/m{number}")
    assert sum(result.state == "failed" for result in first) == count / 10
    assert len(destination.commits) == count * 9 / 10
    assert destination.wrong_blobs() == []
    repair(source, destination)
    second = transfer(license="mit", has_permission=True).run_batch(path)
    assert [result.error for result in second if not result.ok] == []
    assert sum(result.state == "same" for result in second) == count * 9 / 10
    assert all(mirrored(source, destination, f"acme/m{n}", f"mirrors/m{n}") for n in range(count))
    assert destination.info["mirrors/m53"]["private"] is True


def test_a_pause_between_repositories(transfer: Callable[..., Transfer], source: SourceServer, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("acme/none a/b\nacme/none c/d\nacme/none e/f\n")
    times: list[float] = []
    transfer(delay_s=0.3).run_batch(path, on_result=lambda _: times.append(time.monotonic()))
    assert times[2] - times[0] >= 0.6


@pytest.mark.slow
def test_the_command_exits_with_1_and_a_second_run_with_0(tmp_path: Path) -> None:
    """As a user runs it: the summary and the report say which repositories failed."""
    with SourceServer({}) as source, DestinationServer({}, token=TOKEN) as destination:
        (tmp_path / "list.txt").write_text(fill(source, 200))
        break_some(source, destination)
        variables = user(tmp_path, source, destination)
        command = [str(SCRIPT), "transfer", "--batch", "list.txt", "--report", "out.json"]
        first = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        assert first.returncode == 1
        assert "180 succeeded, 20 failed" in first.stderr
        report = json.loads((tmp_path / "out.json").read_text())
        failed = [each["source"] for each in report["transfers"] if each["state"] == "failed"]
        assert failed == [f"huggingface:acme/m{number}" for number in range(200) if fault_of(number)]
        repair(source, destination)
        options = ["--license", "mit", "--i-have-permission"]
        second = subprocess.run(
            [*command, *options], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert (second.returncode, "200 succeeded, 0 failed" in second.stderr) == (0, True)
