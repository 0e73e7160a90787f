"""Artifacts are made once, found again, made anew when anything changes, and thrown away when there are too many."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.artifacts import recipe as recipes
from emb_model_provider.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.artifacts.prepare import PreparedBackend
    from tests.compile.service import Service

from tests.compile.service import ONE_TOKEN

# --- once -------------------------------------------------------------------------------------------------


def test_an_artifact_is_used_again(service: Service) -> None:
    """The second start starts no child, and says so to nobody."""
    for _ in range(2):
        backend = service.prepare().load()
        assert backend.embed(ONE_TOKEN).shape == (1, 48)
        assert backend.description.backend == "openvino"
        backend.close()
    assert (service.starts, service.announced) == (1, 1)


def test_an_artifact_is_made_again_when_the_snapshot_changes(service: Service, tmp_path: Path) -> None:
    """Other files, another artifact."""
    service.prepare()
    (service.directory / "changed.txt").write_text("x")
    try:
        service.prepare()
    finally:
        (service.directory / "changed.txt").unlink()
    assert service.starts == 2
    assert len(service.artifacts) == 2


@pytest.mark.parametrize(
    "package", ["openvino", "torch", "transformers", "sentence-transformers", "tokenizers"]
)
def test_an_artifact_is_made_again_when_a_library_changes(
    package: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade verifies anew."""
    service.prepare()
    real = recipes.installed_version
    monkeypatch.setattr(recipes, "installed_version", lambda name: "99" if name == package else real(name))
    service.prepare()
    assert service.starts == 2


def test_an_artifact_is_made_again_when_the_operator_changes_the_pipeline(service: Service) -> None:
    """pooling, normalize, max_length and precision shape an artifact; an alias and a device's spelling do not."""
    service.prepare(precision="fp32")
    service.prepare(precision="fp32", alias="other", name="elsewhere/model", dimensions=(8,))
    assert service.starts == 1
    for changed in ({"pooling": "cls"}, {"normalize": False}, {"max_length": 20}, {"precision": "fp16"}):
        service.prepare(**{"precision": "fp32", **changed})
    assert service.starts == 5


def test_the_operators_prompts_are_applied_without_compiling(service: Service) -> None:
    """They stand before the text and are not in the graph."""
    service.prepare()
    description = service.prepare(prompts={"query": "q: "}).load().description
    assert description.prompts["query"] == "q: "
    assert service.starts == 1


def test_two_at_once_compile_once(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """The second waits for the first, says that it does, and uses what the first made."""
    service.child_does(wait_for=str(service.root / "go"))
    prepared: list[PreparedBackend] = []
    threads = [threading.Thread(target=lambda: prepared.append(service.prepare())) for _ in range(2)]
    with caplog.at_level(logging.INFO):
        for thread in threads:
            thread.start()
        _wait_until(lambda: "waiting for it" in caplog.text)
        (service.root / "go").touch()
        for thread in threads:
            thread.join(60)
    assert [one.load().description.backend for one in prepared] == ["openvino", "openvino"]
    assert service.starts == 1


def test_progress_is_logged(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Each phase is named with the seconds it took."""
    with caplog.at_level(logging.INFO):
        service.prepare()
    assert "small: compiling: pretend took" in caplog.text


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_a_killed_child_leaves_nothing_and_torch_serves(service: Service) -> None:
    """One clear line says why; it is not remembered, since next time there may be memory."""
    service.child_does(die=int(signal.SIGKILL))
    prepared = service.prepare()
    assert "killed by SIGKILL (most often: not enough memory)" in prepared.notes[0]
    assert service.artifacts == []
    backend = prepared.load()
    assert backend.description.backend == "torch"
    assert prepared.notes[0] in backend.description.notes
    service.child_does()
    assert service.prepare().notes == ()
    assert service.starts == 2


def test_a_refused_artifact_is_remembered(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch serves with the reason; the next start does not try again until something changes."""
    service.child_does(outcome="refused")
    for _ in range(2):
        assert "as the test wants it" in service.prepare().notes[0]
    assert (service.starts, service.artifacts) == (1, [])
    with pytest.raises(LoadError, match="EMB_PROVIDER_BACKEND=openvino: as the test wants it"):
        service.prepare(backend="openvino")
    service.child_does()
    monkeypatch.setattr(recipes, "FORMAT", 999)
    assert service.prepare().notes == ()


def test_a_snapshot_that_gives_no_model_is_an_error(service: Service) -> None:
    """Where the pipeline cannot be loaded, torch would fail as well: it is not tried."""
    service.child_does(outcome="broken")
    with pytest.raises(LoadError, match="as the test wants it"):
        service.prepare()


@pytest.mark.parametrize("name", ["model.bin", "model.xml", "tokenizer.json"])
def test_a_damaged_artifact_is_made_again(name: str, service: Service) -> None:
    """A changed byte, of a file of the same size, and a missing file."""
    service.prepare()
    path = service.artifacts[0] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert service.prepare().load().embed(ONE_TOKEN).shape == (1, 48)
    assert service.starts == 2
    (service.artifacts[0] / name).unlink()
    service.prepare()
    assert service.starts == 3


def test_a_touched_artifact_is_hashed_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy with other time stamps is still the artifact; the new ones are kept."""
    service.prepare()
    os.utime(service.artifacts[0] / "model.bin", (1, 1))
    service.prepare()
    monkeypatch.setattr("emb_model_provider.artifacts.manifest.hash_file", lambda _: pytest.fail("hashed"))
    service.prepare()
    assert service.starts == 1


def test_what_killed_processes_left_is_swept(service: Service) -> None:
    """A directory in the making that nobody holds the lock of is removed by the next compile."""
    leftovers = [service.cache / "artifacts" / name for name in (".abc.x1.tmp", ".def.removed-1.tmp")]
    for path in leftovers:
        path.mkdir(parents=True)
        (path / "model.bin").write_bytes(b"half")
    service.prepare()
    assert not any(path.exists() for path in leftovers)
    assert len(service.artifacts) == 1


def test_compiling_can_be_stopped(service: Service) -> None:
    """The child is gone before prepare_backend returns."""
    service.child_does(wait_for=str(service.root / "never"))
    with pytest.raises(InterruptedError):
        service.prepare(stopped=lambda: service.starts > 0)
    child = int(service.log.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert service.artifacts == []


def _wait_until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(600):
        if condition():
            return
        waiting.wait(0.05)
    pytest.fail("it did not happen")
