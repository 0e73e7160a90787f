"""The Dockerfile's steps as plain commands: no container engine, but all that it would run."""

from __future__ import annotations

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

from tests.container.dockerfile import ROOT, Image, command, the
from tests.service import free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="a Linux container's steps"),
]


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """Yield what the steps make. pytest's own directories cannot be entered by another user."""
    root = Path(tempfile.mkdtemp(prefix="container-"))
    root.chmod(0o755)
    built = Image(root, torch="cpu" if _cpu_index_answers() else "cuda")
    try:
        built.build()
        built.set_writable(writable=False)
        yield built
    finally:
        built.set_writable(writable=True)
        shutil.rmtree(root, ignore_errors=True)


def _cpu_index_answers() -> bool:
    """Return whether PyTorch's CPU build can be had here; else the other build argument is tried."""
    uv = shutil.which("uv")
    if uv is None:
        return False
    done = subprocess.run(
        [uv, "pip", "install", "--torch-backend=cpu", "--dry-run", "--no-deps", "--reinstall", "torch"],
        env=os.environ | {"UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": "15", "VIRTUAL_ENV": sys.prefix},
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def test_the_container_serves_and_stops_in_good_order(image: Image) -> None:
    """As its user, from code it cannot write: healthy, ready, an answer; SIGTERM finishes what was accepted."""
    port = str(free_port())
    health = command(the("HEALTHCHECK"))
    assert image.start(health, PORT=port).wait(60) != 0, "healthy without a service"
    before = image.files()
    process = image.start(command(the("CMD")), PORT=port, MAX_BATCH_SIZE="2")
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: process.poll() is not None or status(f"{url}/ready") == 200, 300)
        assert process.poll() is None
        assert image.start(health, PORT=port).wait(60) == 0
        assert len(embed(url, ["hello"]).json()["data"][0]["embedding"]) == 384

        answers: list[httpx.Response] = []
        texts = ["one of many long texts " * 30] * 40
        client = threading.Thread(target=lambda: answers.append(embed(url, texts)))
        client.start()
        wait_until(lambda: waiting(url) > 0, 30)
        process.send_signal(getattr(signal, the("STOPSIGNAL").text))
        client.join(120)
        assert [(a.status_code, len(a.json()["data"])) for a in answers] == [(200, len(texts))]
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert image.files() == before
    assert any(Path(image.path("/data/.cache/emb_model_provider")).rglob("*.json"))


def test_the_pinned_versions_are_installed(image: Image) -> None:
    """The image has what the tests ran with, to the version, whatever the index has by now."""
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
    pinned = {re.sub(r"[-_.]+", "-", pin.partition(" ")[0]) for pin in pins["constraint-dependencies"]}
    found = [path.name.removesuffix(".dist-info") for path in image.packages().glob("*.dist-info")]
    # A build for one device has a suffix, such as 2.15.0+cpu.
    installed = {
        re.sub(r"[-_.]+", "-", name.partition("+")[0].replace("-", "==", 1).lower()) for name in found
    }
    assert any(name.startswith("torch==") for name in installed)
    assert installed - pinned == {"emb-model-provider==0-1-0"}


def test_the_user_may_not_write_to_the_code(image: Image) -> None:
    """Neither beside the packages nor in the working directory."""
    code = f"open({image.path('/opt/venv/new')!r}, 'w')"
    assert image.start(["python", "-c", code]).wait(60) != 0
    if image.user is not None:
        assert image.start(["python", "-c", "open('new', 'w')"]).wait(60) != 0
        assert image.start(["python", "-c", "import os; assert os.getuid() >= 1000"]).wait(60) == 0


def status(url: str) -> int:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code
    except httpx.TransportError:
        time.sleep(0.2)
        return 0


def embed(url: str, texts: list[str]) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json={"input": texts}, timeout=120, trust_env=False)


def waiting(url: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=5, trust_env=False).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("emb_provider_queue_inputs{"))
