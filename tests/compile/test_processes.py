"""Real processes: a compile from start to first vector, and what is left when one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.models import bundled_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.compile.conftest import Compiled

ROOT = Path(__file__).parents[2]

SERVE = """
import json, logging, sys, time
from pathlib import Path
started = time.perf_counter()
directory, cache = map(Path, sys.argv[1:3])
logging.basicConfig(level=logging.INFO)
from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.artifacts.prepare import prepare_backend
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile, hash_file
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.backends.tokenization import Tokenization
files = []
for path in sorted(directory.rglob("*")):
    if path.is_file():
        found = hash_file(path)
        files.append(SnapshotFile(path.relative_to(directory).as_posix(), found.size, found.sha256))
hashing = time.perf_counter()
snapshot = Snapshot.of("local", "test/small", "local", directory, files)
prepared = prepare_backend(
    ModelSpec(alias="small", name="test/small", device="cpu"), snapshot, trust_remote_code=False,
    cache_dir=cache, max_cache_bytes=10**9, on_compiling=lambda: None,
)
backend = prepared.load()
encoded = Tokenization(backend.description).encode(["hello"], truncate="END")
vectors = backend.embed(TokenBatch(ids=encoded.ids, prompt_lengths=encoded.prompt_lengths))
memory = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")] if sys.platform == "linux" else [0]
print(json.dumps({
    "backend": backend.description.backend,
    "dimension": vectors.shape[1],
    "cosine": backend.description.fidelity and backend.description.fidelity.min_cosine,
    "modules": sorted(name for name in sys.modules if sys.modules[name] is not None and "." not in name),
    "notes": prepared.notes,
    "seconds": time.perf_counter() - hashing,
    "memory_mb": int(memory[0]) / 1024,
}))
"""
HEAVY = {"torch", "transformers", "sentence_transformers", "scipy", "sklearn", "openvino_telemetry"}


def serve(directory: Path, cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, str(directory), str(cache)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_two_processes_compile_once_and_import_no_torch(cache: Path) -> None:
    """Both serve the bundled model from one compile, near enough to fp32, without the libraries that made it."""
    processes = [serve(bundled_directory(), cache) for _ in range(2)]
    logs = [process.communicate(timeout=250) for process in processes]
    answers = [json.loads(out) for out, _ in logs]
    for found in answers:
        assert (found["backend"], found["dimension"], found["notes"]) == ("openvino", 384, [])
        assert found["cosine"] >= 0.9999
        assert not HEAVY & set(found["modules"])
    assert sum("compiling took" in err for _, err in logs) == 1
    assert sum("waiting for it" in err for _, err in logs) <= 1


def test_a_cold_start_is_quick_and_small(cache: Path) -> None:
    """With an artifact the first vector comes within 2 s, in 300 MB, and no torch is imported."""
    answer(serve(bundled_directory(), cache))
    quickest = min(
        (answer(serve(bundled_directory(), cache)) for _ in range(3)), key=lambda one: one["seconds"]
    )
    assert not HEAVY & set(quickest["modules"])
    assert quickest["seconds"] < 2
    assert quickest["memory_mb"] < 300


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_service_takes_its_child_along_and_leaves_nothing_whole(
    compiled: Callable[..., Compiled], tmp_path: Path
) -> None:
    """SIGKILL in the middle of a compile: the child ends, no artifact is there, and the next start makes one."""
    directory = compiled("bert-mean-normalize", precision="fp32").directory
    process = serve(directory, tmp_path)
    try:
        child = _wait_for(lambda: _children(process.pid))[0]
        _wait_for(lambda: list((tmp_path / "artifacts").glob(".*.tmp")))
        time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    _wait_for(lambda: not _is_running(child))
    assert not [path for path in (tmp_path / "artifacts").iterdir() if path.is_dir() and path.name[0] != "."]
    found = answer(serve(directory, tmp_path))
    assert found["backend"] == "openvino"
    assert not list((tmp_path / "artifacts").glob(".*.tmp"))


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                words = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(words[1]) == parent:
                found.append(int(path.name))
    return found


def _is_running(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for(look: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while not (found := look()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found
