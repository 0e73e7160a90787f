"""Real processes: from the start of a compile to the first vector, and what a killed service leaves."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from emb_model_provider.artifacts.compiler_process import CompileJob
from emb_model_provider.artifacts.recipe import recipe_for
from emb_model_provider.errors import ThreadLimitError
from emb_model_provider.model_spec import RequestDefaults
from tests.artifacts.helpers import FAMILY, CompiledModels, Harness, wait_for
from tests.models import bundled_directory, snapshot_of, spec_of
from tests.service import no_more_threads

ROOT = Path(__file__).parents[2]

SERVE = """
import json, logging, sys, time
from pathlib import Path
directory, cache = map(Path, sys.argv[1:3])
logging.basicConfig(level=logging.INFO)
import psutil
from emb_model_provider.artifacts.prepare import BackendPreparer
from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.settings import FidelitySettings, HubSettings, TrustSettings
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile, hash_file
files = []
for path in sorted(directory.rglob("*")):
    if path.is_file():
        files.append(SnapshotFile(path.relative_to(directory).as_posix(), path.stat().st_size, hash_file(path).sha256))
started = time.perf_counter()
snapshot = Snapshot.of("local", "test/small", "local", directory, files)
preparer = BackendPreparer(HubSettings(cache_dir=cache), FidelitySettings(), TrustSettings())
prepared = preparer.prepare(ModelSpec(alias="small", name="test/small", device="cpu"), snapshot)
backend = prepared.load()
encoded = Tokenization(backend.description).encode(["hello"], truncate="END")
vectors = backend.run(TokenBatch(ids=encoded.ids, prompt_lengths=encoded.prompt_lengths)).dense
print(json.dumps({
    "backend": backend.description.backend,
    "dimension": vectors.shape[1],
    "cosine": backend.description.fidelity and backend.description.fidelity.min_cosine,
    "modules": sorted(name for name in sys.modules if sys.modules[name] is not None and "." not in name),
    "notes": prepared.notes,
    "seconds": time.perf_counter() - started,
    "memory_mb": psutil.Process().memory_info().rss / 2**20,
}))
"""
HEAVY = {"torch", "transformers", "sentence_transformers", "scipy", "sklearn", "openvino_telemetry"}


def serve(directory: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, str(directory), str(cache)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_two_processes_compile_once_and_import_no_torch(cache: Path) -> None:
    """Both serve the bundled model from one artifact."""
    processes = [serve(bundled_directory(), cache) for _ in range(2)]
    outputs = [process.communicate(timeout=250) for process in processes]
    for out, _ in outputs:
        result = json.loads(out)
        assert (result["backend"], result["dimension"], result["notes"]) == ("openvino", 384, [])
        assert result["cosine"] >= 0.9999
        assert not HEAVY & set(result["modules"])
    assert sum(": compiled in" in err for _, err in outputs) == 1
    assert sum("waiting for it" in err for _, err in outputs) <= 1


@pytest.mark.slow
def test_a_start_with_an_artifact_is_small(cache: Path) -> None:
    """The first vector comes in 300 MB, and torch is not imported. `benchmarks.start` measures the time."""
    result_of(serve(bundled_directory(), cache))
    again = result_of(serve(bundled_directory(), cache))
    assert not HEAVY & set(again["modules"])
    assert again["memory_mb"] < 300


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="uses prctl and process states of Linux")
def test_the_compiler_ends_with_a_killed_service(compiled: CompiledModels, tmp_path: Path) -> None:
    """There is no artifact after SIGKILL in the middle of a compile; the next start makes one."""
    directory = compiled.directory(FAMILY)
    process = serve(directory, tmp_path)
    try:
        child = wait_for(lambda: psutil.Process(process.pid).children())[0]
        wait_for(lambda: list((tmp_path / "artifacts").glob(".*.tmp")))
        time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert not [path for path in (tmp_path / "artifacts").iterdir() if path.is_dir() and path.name[0] != "."]
    result = result_of(serve(directory, tmp_path))
    assert (result["backend"], result["dimension"]) == ("openvino", 48)
    assert not HEAVY & set(result["modules"])
    assert not list((tmp_path / "artifacts").glob(".*.tmp"))


def test_the_compiler_reads_the_job_that_was_written(tmp_path: Path) -> None:
    """All values are equal except those for downloading, which the compiler does not get."""
    aliases = {"other": RequestDefaults(input_type="query", raw_scores=True)}
    spec = spec_of(prompts={"query": "q: "}, dimensions=(8, 16), more_aliases=aliases)
    snapshot = snapshot_of(bundled_directory())
    snapshot = snapshot.with_dependencies({"acme/code": snapshot})
    recipe = recipe_for(spec, snapshot, trust_remote_code=True, native_bf16=True)
    job = CompileJob(spec=spec, snapshot=snapshot, recipe=recipe, directory=tmp_path, threads=3, tune_s=2)
    assert job.parent == os.getpid()
    written = replace(job, spec=replace(spec, token="secret", endpoint="https://hub", path=tmp_path))
    assert written.to_json() == job.to_json()
    read = CompileJob.from_json(job.to_json())
    assert (read.spec, read.snapshot, read.directory) == (spec, snapshot, tmp_path)
    assert (read.threads, read.tune_s) == (3, 2)
    assert read.recipe.key == recipe.key


def test_steps_are_logged_with_their_duration(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG, because users see progress instead."""
    with caplog.at_level(logging.DEBUG):
        harness.prepare()
    assert "small: compiling: pretend took" in caplog.text


def test_threads_that_cannot_be_started_end_the_compiler(harness: Harness) -> None:
    """The error says what to do, and no process is left."""
    before = psutil.Process().children()
    with no_more_threads(), pytest.raises(ThreadLimitError, match="ulimit -u"):
        harness.prepare()
    assert psutil.Process().children() == before


def test_the_compiler_does_not_inherit_secrets(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and settings are removed from its environment, because it may run code of a repository."""
    report = harness.root / "environment"
    program = f"import json, os; open({str(report)!r}, 'w').write(json.dumps(dict(os.environ)))"
    monkeypatch.setattr("emb_model_provider.artifacts.compiler_process.COMMAND", (sys.executable, "-c", program))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("EMB_PROVIDER_API_KEYS", "secret")
    prepared = harness.prepare()
    environment = json.loads(report.read_text())
    assert "secret" not in environment.values()
    assert (environment["HF_HUB_OFFLINE"], environment["PATH"]) == ("1", os.environ["PATH"])
    assert "the compiler process ended with status 0: it printed nothing" in prepared.notes[0]
