"""`emb-provider transfer`, in this process and as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from tests.cli.helpers import SCRIPT, invoke, invoke_json
from tests.service import wait_until
from tests.transfer.helpers import DESTINATION, SOURCE, TOKEN, WEIGHTS, mirrored, user
from tests.transfer.servers import listed_sha256

if TYPE_CHECKING:
    from pathlib import Path

    from tests.transfer.servers import DestinationServer, SourceServer


@pytest.fixture
def variables(tmp_path: Path, source: SourceServer, destination: DestinationServer) -> dict[str, str]:
    """Return the environment of a user who is logged in to both hubs."""
    return user(tmp_path, source, destination)


@pytest.fixture
def here(tmp_path: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give this process the working directory and the environment of that user."""
    for name in [name for name in os.environ if name not in variables and name != "PYTEST_CURRENT_TEST"]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_repository_is_transferred_and_verified(
    here: Path, source: SourceServer, destination: DestinationServer
) -> None:
    result = invoke("transfer", SOURCE, DESTINATION, "--dry-run")
    assert result.exit_code == 0
    assert "to send" in result.stdout
    assert invoke("transfer", SOURCE, DESTINATION).exit_code == 0
    assert mirrored(source, destination)
    (verified,) = invoke_json("transfer", SOURCE, DESTINATION, "--verify-only")["transfers"]
    assert (verified["state"], verified["same"], verified["sent_bytes"]) == ("same", 5, 0)


def test_differences_exit_with_1(here: Path, source: SourceServer, destination: DestinationServer) -> None:
    result = invoke_json("transfer", SOURCE, DESTINATION, "--verify-only", status=1)
    assert not result["ok"]
    assert len(result["transfers"][0]["missing"]) == 5
    assert DESTINATION not in destination.repos


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ((), "Name a source and a destination"),
        (("a/b",), "Name a source and a destination"),
        (("a/b", "../c"), "not the id of a repository"),
        (("a/b", "c/d", "--batch", "list.txt"), "remove one"),
        (("--batch", "none.txt"), "none.txt cannot be read"),
        (("a/b", "c/d", "--dry-run", "--verify-only"), "exclude each other"),
        (("a/b", "c/d", "--jobs", "0"), "--jobs"),
        (("acme/tiny", "c/d", "--license", "mit\nprivate: false"), "not the id of a license"),
        (("acme/none", "c/d"), "There is no repository huggingface:acme/none"),
    ],
)
def test_invalid_usage_and_unknown_repositories_exit_with_2(
    arguments: tuple[str, ...], phrase: str, here: Path, destination: DestinationServer
) -> None:
    result = invoke("transfer", *arguments)
    assert result.exit_code == 2
    assert phrase in result.stderr
    assert destination.commits == []


def test_missing_rights_exit_with_2(here: Path, source: SourceServer, destination: DestinationServer) -> None:
    source.info[SOURCE] = {"gated": "manual", "cardData": {"license": "mit"}}
    result = invoke("transfer", SOURCE, DESTINATION)
    assert (result.exit_code, "--i-have-permission" in result.stderr) == (2, True)
    assert invoke("transfer", SOURCE, DESTINATION, "--i-have-permission").exit_code == 0
    destination.denied.add("mirrors/denied")
    assert invoke("transfer", SOURCE, "mirrors/denied", "--i-have-permission").exit_code == 2


def test_a_batch_continues_after_a_failure(here: Path, source: SourceServer, destination: DestinationServer) -> None:
    """The report has the results of all repositories; with --fail-fast those after the failure are skipped."""
    (here / "list.txt").write_text(f"# list\nacme/none mirrors/none\n\n{SOURCE} {DESTINATION}\n")
    states = {"all": ["failed", "done"], "first": ["failed", "skipped"]}
    for kind, options in (("first", ["--fail-fast"]), ("all", ["--report", "out.json"])):
        result = invoke_json("transfer", "--batch", "list.txt", *options, status=1)
        assert [each["state"] for each in result["transfers"]] == states[kind]
        assert (result["succeeded"], result["failed"]) == (states[kind].count("done"), 2 - states[kind].count("done"))
    assert json.loads((here / "out.json").read_text()) == result
    assert result["transfers"][0]["error_code"] == "repository_not_found"
    assert mirrored(source, destination)


def test_progress_is_on_stderr(here: Path, destination: DestinationServer) -> None:
    result = invoke("transfer", SOURCE, DESTINATION, "--json", "--progress", "json")
    assert json.loads(result.stdout)["ok"]
    phases = [json.loads(line).get("phase") for line in result.stderr.splitlines()]
    assert list(dict.fromkeys(phases)) == ["resolve", "transfer", "verify"]


def test_the_message_and_the_license_are_options(
    here: Path, source: SourceServer, destination: DestinationServer
) -> None:
    invoke("transfer", SOURCE, DESTINATION, "--license", "bsd-3-clause", "--commit-message", "第一次同步")
    assert destination.info[DESTINATION]["license"] == "bsd-3-clause"
    assert destination.commits[0]["message"] == "第一次同步"


def test_tokens_and_signatures_are_never_shown(
    here: Path, source: SourceServer, destination: DestinationServer
) -> None:
    """Neither in the output and the log, nor in the report and the journal, also if a hub repeats them in an error."""
    destination.fault_body = json.dumps({"Code": 400, "Message": f"bad token {TOKEN} in /upload/x?signature=s3cret"})
    destination.uploads.drop_put_after[listed_sha256(WEIGHTS)] = [1]
    destination.uploads.statuses["PUT"] = [(400, {})]
    arguments = ("--json", "--log-level", "debug", "--progress", "plain", "--report", "out.json")
    result = invoke("transfer", SOURCE, DESTINATION, *arguments)
    assert result.exit_code == 1
    journals = "".join(path.read_text() for path in (here / "cache" / "transfers").iterdir())
    for shown in (result.stderr, result.stdout, (here / "out.json").read_text(), journals):
        assert "bad token *** in /upload/x?" in shown
        assert "s3cret" not in shown


def test_an_interrupt_exits_with_130_and_the_same_command_continues(
    tmp_path: Path, variables: dict[str, str], source: SourceServer, destination: DestinationServer
) -> None:
    destination.uploads.hold_put = threading.Event()
    command = [str(SCRIPT), "transfer", SOURCE, DESTINATION]
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: destination.put_counts or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in stderr
    assert destination.commits == []
    destination.uploads.hold_put.set()
    destination.uploads.hold_put = None
    subprocess.run(command, cwd=tmp_path, env=variables, check=True, capture_output=True)
    assert mirrored(source, destination)
    assert len(source.repos[SOURCE]["model.safetensors"]) == len(WEIGHTS)
