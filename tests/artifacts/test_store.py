"""Artifacts on disk: their number is bounded, and damaged or unfinished ones are not used."""

from __future__ import annotations

import json
import os
import sys
from base64 import b64encode
from typing import TYPE_CHECKING

import numpy as np
import pytest

from emb_model_provider.errors import CacheNotWritableError
from emb_model_provider.snapshots.snapshot import Hashes, hash_file
from tests.artifacts.helpers import ONE_TOKEN

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

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


@pytest.mark.parametrize(
    ("name", "damage"),
    [("model.bin", "weights"), ("model.bin", "zeros"), ("model.bin", "nonsense"), ("model.xml", "zeros"),
     ("tokenizer.json", "nonsense")],
)  # fmt: skip
def test_an_artifact_that_was_damaged_unnoticed_is_compiled_again(name: str, damage: str, harness: Harness) -> None:
    """A part of a file has other bytes, and its size and time stamp are the same, as after a failure of a disk."""
    harness.prepare()
    path = harness.artifacts[0] / name
    os.utime(path, (1, 1))  # the time stamp of a file that was written just now is not trusted
    expected = _vector(harness)
    stat, content = path.stat(), bytearray(path.read_bytes())
    # The second half has weights only, so that the graph can be loaded. The first half has shapes, too.
    start, stop = len(content) // 3, 2 * len(content) // 3
    if damage == "weights":
        start, stop = len(content) // 2, len(content)
    content[start:stop] = (b"<" if damage == "nonsense" else b"\0") * (stop - start)
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for _ in range(2):
        assert np.allclose(_vector(harness), expected, atol=1e-6)
        assert harness.starts == 2


def test_an_undamaged_artifact_with_another_probe_is_used(harness: Harness) -> None:
    """Another processor computes slightly other vectors: hashing shows that the files are unchanged."""
    harness.prepare()
    path = harness.artifacts[0] / "manifest.json"
    manifest = json.loads(path.read_text())
    other = np.random.default_rng(1).normal(size=48).astype("<f4")
    path.write_text(json.dumps({**manifest, "probe": b64encode(other.tobytes()).decode()}))
    assert harness.describe().backend == "openvino"
    assert harness.starts == 1


def test_an_artifact_with_other_time_stamps_is_hashed_once(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are unchanged, so the new time stamps are recorded."""
    harness.prepare()
    os.utime(harness.artifacts[0] / "model.bin", (1, 1))
    hashed: list[str] = []

    def record(path: Path) -> Hashes:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr("emb_model_provider.snapshots.files.hash_file", record)
    harness.prepare()
    harness.prepare()
    assert harness.starts == 1
    assert hashed.count("model.bin") == 1


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


def _vector(harness: Harness) -> NDArray[np.float32]:
    backend = harness.load()
    try:
        return backend.run(ONE_TOKEN).dense
    finally:
        backend.close()
