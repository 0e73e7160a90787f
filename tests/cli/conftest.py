"""What the shell's tests share: hubs on this machine, and settings that point at them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.running import SCRIPT, run
from tests.hubs.conftest import HF_REPO, MS_REPO, model_files, modelscope_files
from tests.hubs.servers import HuggingFaceServer, ModelScopeServer
from tests.models import FAMILIES
from tests.service import environment, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL, COPY = "acme/small", "acme/copy"
"""Two repositories with the files of one real model: what is compiled of the one serves the other."""


@dataclass(frozen=True)
class Compiled:
    """A small model that was pulled and compiled."""

    directory: Path
    """Where commands are run; its cache is there, and the model's own directory, `model`."""
    settings: dict[str, str]
    """Without their prefix. `small` is the model's alias."""
    pulled: dict[str, Any]
    """What `pull --json` said."""
    pulling: str
    """What it said on stderr."""
    interrupted: subprocess.CompletedProcess[str]
    """A `pull` before it, which was interrupted while it compiled."""
    left: list[str]
    """What was left of compiling then: files, and processes."""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """Yield a model that was pulled from a hub, which stays for as long: compiling takes its time, so it is shared."""
    directory = tmp_path_factory.mktemp("compiled")
    model = FAMILIES["bert-mean-normalize"](directory / "model")
    files = {
        path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()
    }
    mapping = {"small": {"name": SMALL, "source": "huggingface", "precision": "fp32"}}
    with HuggingFaceServer({SMALL: files, COPY: files}) as hub:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_CACHE_DIR": str(directory / "hf"),
            "CACHE_DIR": str(directory / "cache"),
            "MODEL_MAPPING": json.dumps(mapping),
            "DEVICE": "cpu",
        }
        interrupted = interrupted_while_compiling(directory, settings)
        left = [path.name for path in (directory / "cache" / "artifacts").iterdir()] + processes_in(directory)
        done = run(directory, "pull", "small", "--json", "--progress", "json", **settings)
        assert done.returncode == 0, done.stderr
        (pulled,) = json.loads(done.stdout)["models"]
        yield Compiled(directory, settings, pulled, done.stderr, interrupted, left)


def interrupted_while_compiling(
    directory: Path, settings: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `pull small`, and interrupt it once there is something half-made."""
    with subprocess.Popen(
        [str(SCRIPT), "pull", "small", "--json", "--progress", "json"],
        cwd=directory,
        env=environment(directory, **settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        wait_until(lambda: process.poll() is not None or [*directory.glob("cache/artifacts/.*.tmp")])
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def phases(said: str) -> list[str]:
    """Return what a `pull --progress json` did, in its order."""
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return list(dict.fromkeys(line["phase"] for line in lines if "phase" in line))


def processes_in(directory: Path) -> list[str]:
    """Return the processes that work in a directory; none where the platform does not tell."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
            if link.readlink() == directory:
                found.append(link.parent.name)
    return found


@pytest.fixture
def huggingface() -> Iterator[HuggingFaceServer]:
    with HuggingFaceServer({HF_REPO: model_files()}) as server:
        yield server


@pytest.fixture
def modelscope() -> Iterator[ModelScopeServer]:
    with ModelScopeServer({MS_REPO: modelscope_files()}) as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path, huggingface: HuggingFaceServer, modelscope: ModelScopeServer) -> dict[str, str]:
    """Return settings, without their prefix, that point at the two hubs and at caches of their own."""
    return {
        "CACHE_DIR": str(tmp_path / "cache"),
        "HF_CACHE_DIR": str(tmp_path / "hf"),
        "HF_ENDPOINT": huggingface.url,
        "MODELSCOPE_CACHE_DIR": str(tmp_path / "ms"),
        "MODELSCOPE_ENDPOINT": modelscope.url,
    }


@pytest.fixture
def here(tmp_path: Path, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this process one that a user runs commands in, under `settings`, with a home of its own."""
    wanted = environment(tmp_path, **settings) | {
        "HOME": str(tmp_path / "home"),
        # Read when ModelScope's client is first imported: five tries take 15 s before it gives up.
        "MODELSCOPE_API_MAX_RETRIES": "1",
    }
    for name in [name for name in os.environ if name not in wanted and name != "PYTEST_CURRENT_TEST"]:
        monkeypatch.delenv(name)
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path
