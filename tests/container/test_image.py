"""The container serves and shuts down. Runs the instructions of the Dockerfile without a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.container.dockerfile import ROOT, Image, command, exec_form, final
from tests.service import free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="the instructions are those of a Linux container"),
]


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """Return the built image. Its directory is not one of pytest's, which other users cannot enter."""
    root = Path(tempfile.mkdtemp(prefix="container-"))
    root.chmod(0o755)
    try:
        yield Image(root, TORCH="cpu" if _has_cpu_index() else "cuda")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def test_container_serves_and_shuts_down_gracefully(image: Image) -> None:
    """It becomes healthy and ready, answers, and finishes accepted requests after SIGTERM."""
    port = str(free_port())
    health = exec_form("HEALTHCHECK")
    assert image.start(health, PORT=port).wait(60) != 0, "healthy without a service"
    before = _files(image)
    process = image.start(command(), PORT=port, MAX_BATCH_SIZE="2")
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: process.poll() is not None or _status(f"{url}/ready") == 200, 300)
        assert process.poll() is None
        assert image.start(health, PORT=port).wait(60) == 0
        assert len(_embed(url, ["hello"]).json()["data"][0]["embedding"]) == 384

        responses: list[httpx.Response] = []
        texts = [f"{number} " + "one of many long texts " * 30 for number in range(40)]
        client = threading.Thread(target=lambda: responses.append(_embed(url, texts)))
        client.start()
        wait_until(lambda: _queued_inputs(url) > 0, 30)
        process.send_signal(signal.Signals[final("STOPSIGNAL")])
        client.join(120)
        assert [(r.status_code, len(r.json()["data"])) for r in responses] == [(200, len(texts))]
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert _files(image) == before
    assert any((image.path(final("VOLUME")) / ".cache" / "emb_model_provider").rglob("*.json"))


def test_pinned_versions_are_installed(image: Image) -> None:
    """The image has the versions with which the tests run, even if the index has newer ones."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = pyproject["tool"]["uv"]["constraint-dependencies"]
    pinned = {re.sub(r"[-_.]+", "-", pin.partition(" ")[0]) for pin in pins}
    found = [
        *image.path("/opt/venv/lib").glob("python3.*/site-packages/*.dist-info"),
        *image.path("/opt/app").glob("*.dist-info"),
    ]
    # Builds for one device have a suffix, such as 2.15.0+cpu.
    installed = {path.name.removesuffix(".dist-info").partition("+")[0].lower() for path in found}
    installed = {re.sub(r"[-_.]+", "-", name.replace("-", "==", 1)) for name in installed}
    assert any(name.startswith("torch==") for name in installed)
    assert installed - pinned == {"emb-model-provider==0-1-0"}


def test_user_cannot_write_to_the_code(image: Image) -> None:
    """Neither to the packages nor to the working directory."""
    if image.user is None:
        pytest.skip("only root can run a process as another user")
    for path in (image.path("/opt/venv/new"), image.path("/opt/app/new"), "new"):
        assert image.start(["python", "-c", f"open({str(path)!r}, 'w')"]).wait(60) != 0
    assert image.start(["python", "-c", "import os; assert os.getuid() >= 1000"]).wait(60) == 0


def test_any_user_of_group_0_can_write_to_the_volume(image: Image) -> None:
    """OpenShift chooses a user without an entry in /etc/passwd."""
    if image.user is None:
        pytest.skip("only root can run a process as another user")
    program = "import pathlib; pathlib.Path.home().joinpath('written').write_text('x')"
    assert image.start(["python", "-c", program], user=54321, group=0).wait(60) == 0
    assert image.start(["python", "-c", program.replace("written", "other")], user=54321, group=54321).wait(60) != 0


@pytest.fixture(scope="module")
def baked(image: Image) -> Iterator[Image]:
    """Return an image without torch that contains the bundled model, compiled."""
    root = Path(tempfile.mkdtemp(prefix="baked-"))
    root.chmod(0o755)
    try:
        yield Image(root, "baked", images={"models": image.extend("models")})
    finally:
        shutil.rmtree(root, ignore_errors=True)


def test_slim_image_has_no_torch(baked: Image) -> None:
    """Only what serves a compiled model is installed."""
    files = baked.path("/opt/venv/lib").glob("python3.*/site-packages/*.dist-info")
    installed = {path.name.partition("-")[0] for path in files}
    assert {"openvino", "tokenizers", "uvicorn"} <= installed
    assert not {"torch", "transformers", "sentence_transformers", "nncf", "peft"} & installed


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_model_in_an_image_is_served_with_an_empty_volume(baked: Image, precision: str) -> None:
    """It was compiled at fp32, which also serves a processor for which another precision would be compiled."""
    volume = baked.path(final("VOLUME"))
    shutil.rmtree(volume)
    volume.mkdir()
    volume.chmod(0o777)
    (manifest,) = baked.path("/models/cache/artifacts").glob("*/manifest.json")
    assert json.loads(manifest.read_bytes())["recipe"]["compute"] == ["fp32"]
    port = str(free_port())
    before = _files(baked)
    process = baked.start(command(), PORT=port, MODEL_PRECISION=precision)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: process.poll() is not None or _status(f"{url}/ready") == 200, 120)
        assert process.poll() is None
        assert len(_embed(url, ["hello"]).json()["data"][0]["embedding"]) == 384
        (model,) = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
        assert (model["backend"], model["precision"]) == ("openvino", "fp32")
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert _files(baked) == before


def _has_cpu_index() -> bool:
    """Return whether the index of PyTorch's CPU builds can be reached. If not, the other build argument is used."""
    uv = shutil.which("uv")
    if uv is None:
        return False
    result = subprocess.run(
        [uv, "pip", "install", "--torch-backend=cpu", "--dry-run", "--no-deps", "--reinstall", "torch"],
        env=os.environ | {"UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": "15", "VIRTUAL_ENV": sys.prefix},
        capture_output=True,
        check=False,
    )
    return result.returncode == 0


def _files(image: Image) -> set[Path]:
    """Return all files outside the volume."""
    volume = image.path(final("VOLUME"))
    return {path for path in image.root.rglob("*") if not path.is_relative_to(volume) and path.is_file()}


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code
    except httpx.TransportError:
        time.sleep(0.2)
        return 0


def _embed(url: str, texts: list[str]) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json={"input": texts}, timeout=120, trust_env=False)


def _queued_inputs(url: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=5, trust_env=False).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("emb_provider_queue_inputs{"))
