"""Verification and repair of models on disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import OperationCancelledError
from emb_model_provider.progress import CancelToken
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS, model_files
from tests.hubs.helpers import write_files

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.progress import Progress
    from tests.hubs.servers import HuggingFaceServer


def corrupt(path: Path) -> None:
    """Reverse the bytes of a file, and restore its time stamps."""
    stat = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_damage_is_found_and_repaired_by_the_next_use(manager: ModelManager, repo: str) -> None:
    """One file has wrong bytes at its size and time stamp, another is missing."""
    path = manager.ensure_model_cached(repo)
    (model,) = manager.find(repo)
    assert manager.verify(model).ok
    weights = (path / ("model.safetensors" if repo == HF_REPO else "pytorch_model.bin")).resolve()
    corrupt(weights)
    (path / "config.json").unlink()
    assert manager.find(repo)[0].state == "damaged"
    verification = manager.verify(model)
    assert not verification.ok
    problems = {finding.path: finding.problem for finding in verification.findings}
    assert sorted(problems.values()) == ["bytes", "missing"]
    assert problems["config.json"] == "missing"
    manager.ensure_model_cached(repo)
    assert manager.verify(manager.find(repo)[0]).ok
    assert weights.read_bytes() == WEIGHTS


def test_wrong_bytes_are_not_served_after_a_verification(manager: ModelManager) -> None:
    """Their size and time stamp are unchanged, so that nothing else finds them."""
    path = manager.ensure_model_cached(MS_REPO)
    corrupt(path / "pytorch_model.bin")
    (model,) = manager.list()
    assert model.state == "complete"
    assert manager.verify(model).state == "damaged"
    assert manager.list()[0].state == "damaged"
    manager.ensure_model_cached(MS_REPO)
    assert manager.list()[0].state == "complete"
    assert (path / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_verification_can_be_cancelled(manager: ModelManager) -> None:
    manager.ensure_model_cached(MS_REPO)
    cancel = CancelToken()
    reports: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        reports.append(progress)
        cancel.cancel()

    with pytest.raises(OperationCancelledError):
        manager.verify(manager.list()[0], on_progress=on_progress, cancel=cancel)
    assert len(reports) == 1


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_repair_downloads_wrong_files_again(manager: ModelManager, repo: str) -> None:
    path = manager.ensure_model_cached(repo)
    corrupt((path / "config.json").resolve())
    repaired, notes = manager.repair(manager.verify(manager.list()[0]))
    assert (repaired.ok, notes) == (True, [])


def test_repair_follows_a_branch_that_has_moved(manager: ModelManager, huggingface: HuggingFaceServer) -> None:
    """The verification that is returned is that of the directory of the newer commit."""
    path = manager.ensure_model_cached(HF_REPO)
    corrupt((path / "config.json").resolve())
    verification = manager.verify(manager.list()[0])
    huggingface.repos[HF_REPO]["config.json"] = b'{"model_type": "bert", "hidden_size": 16}'
    repaired, _ = manager.repair(verification)
    assert repaired.ok
    assert repaired.revision == huggingface.commit(HF_REPO)
    assert repaired.path != str(path)


@pytest.mark.parametrize(
    ("front_matter", "license_name"),
    [
        ("license: apache-2.0\ntags: []", "apache-2.0"),
        ("license: 'mit'  # as upstream", "mit"),
        ("license:\n- mit\n- apache-2.0", "mit"),
        ("license:\ntags: []", None),
        ("tags: []", None),
    ],
)
def test_license_of_a_model(
    manager: ModelManager, huggingface: HuggingFaceServer, front_matter: str, license_name: str | None
) -> None:
    huggingface.repos[HF_REPO]["README.md"] = f"---\n{front_matter}\n---\nlicense: none\n".encode()
    manager.ensure_model_cached(HF_REPO)
    assert manager.inspect(manager.list()[0]).license == license_name


def test_files_of_a_directory_are_not_repaired(manager: ModelManager, tmp_path: Path) -> None:
    write_files(tmp_path / "mine", model_files())
    manager.ensure_model_cached(str(tmp_path / "mine"))
    corrupt(tmp_path / "mine" / "model.safetensors")
    verification = manager.verify(manager.list()[0])
    repaired, (note,) = manager.repair(verification)
    assert repaired == verification
    assert "your own" in note
