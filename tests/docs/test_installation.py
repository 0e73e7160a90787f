"""The commands of docs/troubleshooting.md that install without CUDA, after the first command of the README."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import threading
import tomllib
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from tests.docs.markdown import ROOT, blocks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CPU_INDEX = "https://mirrors.nju.edu.cn/pytorch/whl/cpu"


@pytest.fixture
def cpu_index(tmp_path: Path) -> Iterator[str]:
    """Yield the URL of an index like that of PyTorch's CPU builds, with the pinned version of torch."""
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]["constraint-dependencies"]
    version = next(pin for pin in pins if pin.startswith("torch==")).removeprefix("torch==") + "+cpu"
    directory = tmp_path / "index"
    (directory / "torch").mkdir(parents=True)
    wheel = f"torch-{version}-py3-none-any.whl"
    with zipfile.ZipFile(directory / "torch" / wheel, "w") as archive:
        metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        archive.writestr(f"torch-{version}.dist-info/METADATA", metadata)
        archive.writestr(f"torch-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"torch-{version}.dist-info/RECORD", "")
    (directory / "torch" / "index.html").write_text(f'<a href="{wheel.replace("+", "%2B")}">{wheel}</a>')

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(directory))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_cpu_build_replaces_an_existing_environment(tmp_path: Path, cpu_index: str) -> None:
    """The recipe replaces `.venv`, and would install PyTorch's CPU build, no CUDA, and other packages from PyPI."""
    recipes = [block.text for block in blocks(ROOT / "docs" / "troubleshooting.md") if "uv venv --clear" in block.text]
    plain, mirrored = (recipe.splitlines() for recipe in recipes)
    assert (plain[0], plain[2]) == (mirrored[0], mirrored[2])
    assert "--torch-backend=cpu" in plain[1]
    assert CPU_INDEX in mirrored[1]
    project = tmp_path / "project"
    shutil.copytree(ROOT / "emb_model_provider", project / "emb_model_provider", ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    environ = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}

    def run(command: str) -> str:
        done = subprocess.run(
            ["sh", "-c", command], cwd=project, env=environ, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    run("uv venv")
    run(mirrored[0])
    planned = run(mirrored[1].replace(CPU_INDEX, cpu_index).replace("install", "install --dry-run", 1))
    names = {line.split()[1].partition("==")[0] for line in planned.splitlines() if line.startswith(" + ")}
    assert "+cpu" in next(line for line in planned.splitlines() if line.startswith(" + torch=="))
    assert {"openvino", "transformers"} <= names
    assert not {name for name in names if name.startswith("nvidia")}
