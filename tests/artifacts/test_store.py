"""Artifacts on disk: their number is bounded, and damaged or unfinished ones are not used."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import CacheNotWritableError

if TYPE_CHECKING:
    from tests.artifacts.helpers import Harness


def test_the_least_recently_used_artifacts_are_removed(harness: Harness) -> None:
    """An artifact that is in use is kept, however old it is."""
    loaded = harness.load(max_length=40)
    harness.prepare(max_length=41)
    size = sum(path.stat().st_size for path in harness.artifacts[0].iterdir())
    harness.max_artifacts_gb = 2.5 * size / 2**30
    _age(harness)
    harness.prepare(max_length=42)
    harness.prepare(max_length=43)
    assert len(harness.artifacts) == 2
    starts = harness.starts
    harness.prepare(max_length=40)
    assert harness.starts == starts
    loaded.close()
    _age(harness)
    harness.prepare(max_length=44)
    harness.prepare(max_length=45)
    harness.prepare(max_length=40)
    assert harness.starts == starts + 3


@pytest.mark.skipif(os.geteuid() == 0 and sys.platform != "linux", reason="permissions do not bind root")
def test_a_cache_that_is_not_writable(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its artifacts are used. Without one torch serves, or a requested openvino fails and names the setting."""

    def refuse(*_: object) -> None:
        raise CacheNotWritableError("Cannot write: set EMB_PROVIDER_CACHE_DIR")

    harness.prepare()
    monkeypatch.setattr("emb_model_provider.artifacts.store.require_writable", refuse)
    for path in (harness.cache / "artifacts").glob("*.hold"):
        path.unlink()
    (harness.cache / "artifacts").chmod(0o555)
    try:
        assert harness.describe().backend == "openvino"
        assert "EMB_PROVIDER_CACHE_DIR" in harness.prepare(max_length=9).notes[0]
        with pytest.raises(CacheNotWritableError, match="EMB_PROVIDER_CACHE_DIR"):
            harness.prepare(max_length=9, backend="openvino")
    finally:
        (harness.cache / "artifacts").chmod(0o755)
    assert harness.starts == 1


@pytest.mark.parametrize("name", ["model.bin", "model.xml", "tokenizer.json"])
def test_a_damaged_artifact_is_compiled_again(name: str, harness: Harness) -> None:
    """One byte of a file was changed, or the file is missing."""
    harness.prepare()
    path = harness.artifacts[0] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert harness.describe().backend == "openvino"
    assert harness.starts == 2
    (harness.artifacts[0] / name).unlink()
    harness.prepare()
    assert harness.starts == 3


def test_an_artifact_with_other_time_stamps_is_hashed_once(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are unchanged, so the new time stamps are recorded."""
    harness.prepare()
    os.utime(harness.artifacts[0] / "model.bin", (1, 1))
    harness.prepare()
    monkeypatch.setattr("emb_model_provider.snapshots.files.hash_file", lambda _: pytest.fail("hashed again"))
    harness.prepare()
    assert harness.starts == 1


def test_directories_of_killed_processes_are_removed(harness: Harness) -> None:
    """The next compile removes unfinished artifacts whose lock is free."""
    unfinished = [harness.cache / "artifacts" / name for name in (".abc.x1.tmp", ".def.removed-1.tmp")]
    for path in unfinished:
        path.mkdir(parents=True)
        (path / "model.bin").write_bytes(b"half")
    harness.prepare()
    assert not any(path.exists() for path in unfinished)
    assert len(harness.artifacts) == 1


def _age(harness: Harness) -> None:
    for path in harness.artifacts:
        os.utime(path, ns=(10**9, 10**9))
