"""`rm` and `prune`."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_resolver import resolve_model
from emb_model_provider.settings.loading import load_settings
from tests.cli.helpers import SCRIPT, cache_content, invoke, invoke_json, pull_files
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Compiled


def create_unfinished_artifact(directory: Path) -> Path:
    path = directory / "cache" / "artifacts" / ".0a1b.made.tmp"
    path.mkdir(parents=True)
    (path / "model.bin").write_bytes(b"?" * 1000)
    return path


# --- confirmation -------------------------------------------------------------------------------------


def test_rm_without_a_terminal_requires_yes(here: Path) -> None:
    pull_files(HF_REPO)
    refused = invoke("rm", HF_REPO, stdin="y\n")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--yes" in refused.stderr
    assert [model["model_name"] for model in invoke_json("list")["models"]] == [HF_REPO]


def test_rm_dry_run_removes_nothing(here: Path) -> None:
    pull_files(HF_REPO)
    planned = invoke_json("rm", HF_REPO, "--dry-run")
    assert planned["dry_run"] is True
    assert planned["freed"] > len(WEIGHTS)
    assert [model["model_name"] for model in invoke_json("list")["models"]] == [HF_REPO]


def test_rm_asks_on_a_terminal(here: Path) -> None:
    """On stderr. After `n` the model is kept, and the exit code is 1."""
    pull_files(HF_REPO)
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [str(SCRIPT), "rm", HF_REPO], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        )
        os.write(ours, b"n\n")
        stdout, stderr = process.communicate(timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (process.returncode, stdout) == (1, "")
    assert f"Remove {HF_REPO}" in stderr
    assert [model["model_name"] for model in invoke_json("list")["models"]] == [HF_REPO]


# --- rm -----------------------------------------------------------------------------------------------


def test_rm_of_an_unknown_model_does_not_advise_to_download_it(here: Path) -> None:
    """`show` does, with the id of a repository, of which the name over HTTP is another spelling."""
    shown, removed = invoke("show", "Qwen_Qwen3-0.6B"), invoke("rm", "-y", "Qwen_Qwen3-0.6B")
    assert (shown.exit_code, removed.exit_code) == (2, 2)
    assert "`emb-provider pull Qwen/Qwen3-0.6B`" in shown.stderr
    assert "pull" not in removed.stderr
    assert "`emb-provider pull OWNER/bge-m3`" in invoke("show", "bge-m3").stderr


def test_rm_leaves_no_files_behind(here: Path) -> None:
    """Neither in the caches of the hubs nor in ours, except lock files. Removing it again exits with 2."""
    before = cache_content(here)
    pull_files(HF_REPO)
    pull_files(MS_REPO, "--source", "modelscope")
    removed = invoke_json("rm", "-y", HF_REPO, MS_REPO)
    assert [model["model_name"] for model in removed["models"]] == [HF_REPO, MS_REPO]
    assert cache_content(here) == before
    assert invoke("rm", "-y", HF_REPO).exit_code == 2


def test_a_model_in_use_is_kept(here: Path) -> None:
    """If it is named, nothing is removed. With --all the others are removed. The exit code is 2."""
    pull_files(HF_REPO)
    pull_files(MS_REPO, "--source", "modelscope")
    settings, _ = load_settings()
    _, lock = ModelManager(settings).acquire(resolve_model(settings, HF_REPO))
    with lock:
        refused = invoke("rm", "-y", MS_REPO, HF_REPO)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert f"{HF_REPO} is in use" in refused.stderr
        assert len(invoke_json("list")["models"]) == 2
        removed = invoke_json("rm", "-y", "--all", status=2)
        assert [model["model_name"] for model in removed["models"]] == [MS_REPO]
        assert [model["model_name"] for model in removed["kept"]] == [HF_REPO]
        removed = invoke_json("rm", "-y", "--all", status=2)
        assert (removed["dry_run"], removed["models"]) == (False, [])
        assert [model["model_name"] for model in removed["kept"]] == [HF_REPO]
    assert [model["model_name"] for model in invoke_json("list")["models"]] == [HF_REPO]


def test_wait_waits_until_a_model_is_released(here: Path) -> None:
    pull_files(HF_REPO)
    settings, _ = load_settings()
    _, lock = ModelManager(settings).acquire(resolve_model(settings, HF_REPO))
    timer = threading.Timer(0.5, lock.release)
    timer.start()
    assert invoke("rm", "-y", "--all", "--wait", "600").exit_code == 0
    timer.join()
    assert invoke_json("list")["models"] == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--wait", "60")])
def test_rm_all_removes_compiled_forms_without_a_model(
    options: tuple[str, ...], compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks before that, too."""
    cache = shutil.copytree(compiled.directory / "cache", tmp_path / "cache")
    for name, value in (compiled.settings | {"CACHE_DIR": str(cache), "OFFLINE": "true"}).items():
        monkeypatch.setenv(f"EMB_PROVIDER_{name}", value)
    monkeypatch.chdir(tmp_path)
    artifacts = {path.parent for path in cache.glob("artifacts/*/model.bin")}
    assert artifacts
    shutil.rmtree(cache / "snapshots")
    refused = invoke("rm", "--all", *options)
    assert refused.exit_code == 2
    assert f"{len(artifacts)} compiled form(s)" in refused.stderr
    assert all(artifact.exists() for artifact in artifacts)
    removed = invoke_json("rm", "--all", "-y", *options)["artifacts"]
    assert set(removed) == {artifact.name for artifact in artifacts}
    assert not any(artifact.exists() for artifact in artifacts)


def test_list_and_rm_can_be_piped(here: Path) -> None:
    """`emb-provider list -q | xargs emb-provider rm -y` removes all listed models."""
    pull_files(HF_REPO)
    pull_files(MS_REPO, "--source", "modelscope")
    line = f"{SCRIPT} list -q | xargs {SCRIPT} rm -y"
    done = subprocess.run(["sh", "-c", line], cwd=here, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert invoke_json("list")["models"] == []


# --- prune --------------------------------------------------------------------------------------------


def test_prune_keeps_complete_models(here: Path) -> None:
    """Without leftovers it does not ask."""
    pull_files(HF_REPO)
    result = invoke("prune")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing to remove" in result.stderr
    assert len(invoke_json("list")["models"]) == 1


def test_rm_all_removes_unfinished_artifacts(here: Path) -> None:
    """Even without models. It does not ask."""
    unfinished = create_unfinished_artifact(here)
    assert invoke_json("rm", "--all")["freed"] == 1000
    assert not unfinished.exists()


def test_prune_removes_unfinished_artifacts(here: Path) -> None:
    """Such as those of a killed compiler. They are in no list, so that it does not ask."""
    directory = pull_files(HF_REPO)
    before = cache_content(here)
    unfinished = create_unfinished_artifact(here)
    planned = invoke_json("prune", "--dry-run")
    assert (planned["dry_run"], planned["freed"], unfinished.exists()) == (True, 1000, True)
    pruned = invoke_json("prune")
    assert (pruned["dry_run"], pruned["freed"]) == (False, 1000)
    assert not unfinished.exists()
    assert cache_content(here) == before
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
