"""Starts of the service with directories that cannot be written, full disks, and after SIGKILL."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.hubs.servers import HuggingFaceServer
from tests.models import FAMILIES
from tests.service import BUNDLED, COMMAND, Service, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sentence_transformers import SentenceTransformer

REPO = "acme/small"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model's directory."""
    return FAMILIES["bert-mean-normalize"](tmp_path_factory.mktemp("model") / "small")


@pytest.fixture
def hub(model: Path) -> Iterator[HuggingFaceServer]:
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    with HuggingFaceServer({REPO: files}) as server:
        yield server


def with_tmpfs(directory: Path, options: str) -> list[str]:
    """Return the command of the service with a small file system mounted at `directory`.

    Skips the test if this user may not mount one.
    """
    directory.mkdir()
    script = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", options, str(directory)]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a file system: {error}")
    return [*command, *COMMAND]


def with_read_only_root(directory: Path) -> list[str]:
    """Return the beginning of a command that sees `directory` at /mnt, and no other directory for temporary files.

    Its working directory cannot be written. Skips the test if this user may not mount file systems.
    """
    script = (
        'mount --bind "$1" /mnt && mkdir -p /mnt/cwd && mount --bind /mnt/cwd /mnt/cwd && mount -o remount,ro,bind /mnt/cwd'
        " && for d in /tmp /var/tmp /usr/tmp; do [ ! -d $d ] || { mount --bind $d $d && mount -o remount,ro,bind $d; } || exit 1"
        "; done"
        ' && cd /mnt/cwd && shift && unset TMPDIR && exec "$@"'
    )
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(directory)]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a file system: {error}")
    return command


TEMPORARY_FILES = """
import os, subprocess, sys
from pathlib import Path
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.settings import Settings
from emb_model_provider.snapshots.files import temporary_directory
ModelManager(Settings.from_values(cache_dir=Path(sys.argv[1])))
with temporary_directory() as directory:
    (directory / "file").touch()
    print(directory.parent)
print(subprocess.check_output([sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"], text=True))
"""


def test_temporary_files_are_in_the_cache_if_there_is_no_other_place(tmp_path: Path) -> None:
    """Also those of child processes, such as the compiler's. Without a cache the error says what to do."""
    command = [*with_read_only_root(tmp_path), sys.executable, "-c", TEMPORARY_FILES]
    done = subprocess.run([*command, "/mnt/cache"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["/mnt/cache/tmp"] * 2
    failed = subprocess.run([*command, "/mnt/cwd/cache"], capture_output=True, text=True, check=False)
    assert "No directory for temporary files can be written" in failed.stderr.splitlines()[-1]
    assert "set TMPDIR or EMB_PROVIDER_CACHE_DIR" in failed.stderr.splitlines()[-1]


@pytest.mark.slow
def test_service_with_a_read_only_root_serves(tmp_path: Path) -> None:
    """Only the cache can be written: the model is compiled, and the missing log file is one warning."""
    base = tmp_path / "base"
    base.mkdir()
    command = [*with_read_only_root(base), *COMMAND]
    with Service(tmp_path / "service", command=command, CACHE_DIR="/mnt/cache", BACKEND="openvino") as service:
        service.wait()
        assert len(service.embed("hello").json()["data"][0]["embedding"]) == 384
        assert service.stop() == 0
    lines = [json.loads(line) for line in service.stderr_text().splitlines()]
    assert ["EMB_PROVIDER_LOG_DIR=logs" in line["message"] for line in lines if line["level"] == "WARNING"] == [True]


_NOT_AT_START = {
    "alembic", "httpx", "huggingface_hub", "modelscope_hub", "nncf", "numpy.ma", "openvino.frontend.tensorflow",
    "openvino.tools.ovc.convert", "opentelemetry.sdk", "pandas", "psycopg", "pyarrow", "scipy",
    "sentence_transformers", "sqlalchemy", "torch", "tqdm", "transformers",
}  # fmt: skip
"""Large modules that a service with compiled models does not need, or not before it uses a hub or its Batch API."""


def test_start_with_a_compiled_model_imports_no_large_library(tmp_path: Path, service_cache: str) -> None:
    """Also with the first request. The modules that the real process imports are those of `-X importtime`."""
    settings = {"CACHE_DIR": service_cache, "BACKEND": "openvino"}
    with Service(tmp_path / "first", **settings) as service:
        service.wait()
    command = [sys.executable, "-X", "importtime", *COMMAND[1:]]
    with Service(tmp_path / "second", command=command, **settings) as service:
        service.wait()
        assert service.embed("hello").status_code == 200
        lines = service.stderr_text().splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert {"fastapi", "numpy", "openvino", "tokenizers"} <= imported
    assert imported & _NOT_AT_START == set()


def errors(service: Service) -> list[str]:
    return [line["message"] for line in service.log_lines(level="ERROR")]


def test_cache_that_cannot_be_written_is_reported_in_one_line(tmp_path: Path) -> None:
    """The line names the directory and the setting. No model can be served, so the exit code is 1."""
    (tmp_path / "file").touch()
    settings = {"CACHE_DIR": str(tmp_path / "file" / "cache"), "BACKEND": "openvino"}
    with Service(tmp_path / "service", **settings) as service:
        assert service.ended() == 1
    reason, last = errors(service)
    assert f"Cannot write to {tmp_path / 'file' / 'cache'}" in reason
    assert "Set EMB_PROVIDER_CACHE_DIR" in reason
    assert last.startswith("no model could be loaded")


def test_full_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    """If a compiled model does not fit, the line names the directory and what to do."""
    command = with_tmpfs(tmp_path / "full", "nr_inodes=1")
    settings = {"CACHE_DIR": str(tmp_path / "full" / "cache"), "BACKEND": "openvino"}
    with Service(tmp_path / "service", command=command, **settings) as service:
        assert service.ended() == 1
    reason, last = errors(service)
    assert f"No space left in {tmp_path / 'full' / 'cache'}" in reason
    assert "set EMB_PROVIDER_CACHE_DIR to a directory on a larger disk" in reason
    assert last.startswith("no model could be loaded")


@pytest.mark.slow
def test_disk_that_is_full_while_compiling_is_reported_in_one_line(tmp_path: Path) -> None:
    """OpenVINO would end the compiler, and the reason would be SIGABRT."""
    command = with_tmpfs(tmp_path / "full", "size=20m")
    settings = {"CACHE_DIR": str(tmp_path / "full" / "cache"), "BACKEND": "openvino"}
    with Service(tmp_path / "service", command=command, **settings) as service:
        assert service.ended() == 1
    reason, last = errors(service)
    assert f"No space left in {tmp_path / 'full' / 'cache'}" in reason
    assert "SIG" not in reason
    assert last.startswith("no model could be loaded")


@pytest.mark.parametrize(("required", "status"), [("good", 200), ("none", 200), ("good,bad", 503), ("", 503)])
def test_required_models_decide_whether_the_service_is_ready(
    tmp_path: Path, service_cache: str, required: str, status: int
) -> None:
    """A model that failed and is not required is shown, and does not take the others out of a load balancer."""
    mapping = {"good": {"name": BUNDLED}, "bad": {"name": "bad", "path": str(tmp_path / "missing")}}
    settings = {"CACHE_DIR": service_cache, "MODEL_MAPPING": json.dumps(mapping), "REQUIRED_MODELS": required}
    with Service(tmp_path / "service", **settings) as service:
        service.wait_for_state("good", "ready").wait_for_state("bad", "failed")
        ready = service.http.get("/ready")
        assert ready.status_code == status
        bad = ready.json()["models"]["bad"]
        assert "does not exist" in bad["error"]
        assert bad.get("required") == (None if status == 503 else False)


@pytest.mark.slow
def test_full_disk_affects_only_one_model(tmp_path: Path, service_cache: str, hub: HuggingFaceServer) -> None:
    """/ready reports a download that does not fit, and the other model is served."""
    command = with_tmpfs(tmp_path / "full", "size=64k")
    mapping = {"good": {"name": BUNDLED}, "large": {"name": REPO, "source": "huggingface"}}
    settings = {
        "CACHE_DIR": service_cache,
        "HF_CACHE_DIR": str(tmp_path / "full" / "hub"),
        "HF_ENDPOINT": hub.url,
        "MODEL_MAPPING": json.dumps(mapping),
    }
    with Service(tmp_path / "service", command=command, **settings) as service:
        service.wait_for_state("good", "ready").wait_for_state("large", "failed")
        assert service.embed("hello", model="good").status_code == 200
        ready = service.http.get("/ready")
        assert ready.status_code == 503
        error = ready.json()["models"]["large"]["error"]
    assert f"No space left in {tmp_path / 'full' / 'hub'}" in error
    assert "set EMB_PROVIDER_HF_CACHE_DIR" in error
    assert len(errors(service)) == 1
    assert "Traceback" not in service.stderr_text()


@pytest.mark.slow
def test_start_after_sigkill_serves_correct_vectors(tmp_path: Path, model: Path, hub: HuggingFaceServer) -> None:
    """The service is killed while it downloads, compiles, loads and serves, with the same cache."""
    settings: dict[str, Any] = {
        "CACHE_DIR": str(tmp_path / "cache"),
        "HF_CACHE_DIR": str(tmp_path / "hub"),
        "HF_ENDPOINT": hub.url,
        "MODEL_NAME": REPO,
        "MODEL_SOURCE": "huggingface",
        "MODEL_PRECISION": "fp32",
        "BACKEND": "openvino",
    }
    artifacts = tmp_path / "cache" / "artifacts"

    def state() -> str:
        value: str = service.http.get("/ready").json()["models"][REPO]["state"]
        return value

    def is_compiled() -> bool:
        return any(artifacts.glob("[!.]*/manifest.json"))

    def kill() -> None:
        service.signal(signal.SIGKILL)
        assert service.ended() == -signal.SIGKILL

    hub.faults.hold_after[WEIGHTS] = 1_000
    with Service(tmp_path / "downloading", **settings) as service:
        wait_until(lambda: hub.bodies()[WEIGHTS] == 1)
        assert state() == "downloading"
        kill()
    hub.faults.hold_after.clear()
    with Service(tmp_path / "compiling", **settings) as service:
        # A model this small may be compiled before the first check.
        wait_until(lambda: list(artifacts.glob(".*.tmp")) or is_compiled(), 560)
        kill()
    with Service(tmp_path / "loading", **settings) as service:
        service.wait("/health")
        # A model this small may be ready before the first check.
        wait_until(lambda: is_compiled() and state() in ("loading", "ready"), 560)
        kill()
    texts = ["hello", "a second text", "a third one, somewhat longer than the others"]
    with Service(tmp_path / "serving", **settings) as service:
        service.wait()
        served = vectors(service, texts)
        kill()
    with Service(tmp_path / "last", **settings) as service:
        service.wait()
        served_last = vectors(service, texts)
        assert service.stop() == 0
    assert "damaged" not in service.log_text()
    assert not list(artifacts.glob(".*.tmp"))
    expected = reference(model).encode(texts, convert_to_numpy=True)
    for actual in (served, served_last):
        assert (actual * expected).sum(axis=1).min() > 0.999  # both are normalized


def vectors(service: Service, texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    data = service.embed(texts).json()["data"]
    return np.array([item["embedding"] for item in data], dtype=np.float32)


def reference(model: Path) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(model), device="cpu", local_files_only=True)
