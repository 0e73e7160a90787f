"""Fixtures of the command line's tests: hubs on this machine, and settings that point at them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.settings.loading import load_settings
from tests.cli.helpers import processes_in, run, start
from tests.hubs.conftest import HF_REPO, MS_REPO, model_files, modelscope_files
from tests.hubs.servers import HuggingFaceServer, ModelScopeServer
from tests.models import FAMILIES
from tests.service import environment, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from emb_model_provider.settings import Settings

SMALL, COPY = "acme/small", "acme/copy"
"""Two repositories with the same files, so that they share artifacts."""


@dataclass(frozen=True)
class Compiled:
    """A small model that was pulled and compiled."""

    directory: Path
    """The working directory of commands. It contains the cache, and `model`, a directory with the model's files."""
    settings: dict[str, str]
    """Without their prefix. `small` is the alias of the model."""
    pulled: dict[str, Any]
    """The model in the output of `pull --json`."""
    stderr: str
    """The progress of that pull."""
    interrupted: subprocess.CompletedProcess[str]
    """A pull before it, which was interrupted while the model was compiled."""
    left: list[object]
    """Artifacts and processes that the interrupted pull left behind."""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """Yield a model that was pulled from a hub and compiled. Shared, because compiling takes tens of seconds."""
    directory = tmp_path_factory.mktemp("compiled")
    model = FAMILIES["bert-mean-normalize"](directory / "model")
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    mapping = {"small": {"name": SMALL, "source": "huggingface", "precision": "fp32"}}
    with HuggingFaceServer({SMALL: files, COPY: files}) as hub:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_CACHE_DIR": str(directory / "hf"),
            "CACHE_DIR": str(directory / "cache"),
            "MODEL_MAPPING": json.dumps(mapping),
            "DEVICE": "cpu",
        }
        interrupted = interrupt_while_compiling(directory, settings)
        left = [
            *(path.name for path in (directory / "cache/artifacts").iterdir() if path.suffix != ".lock"),
            *processes_in(directory),
        ]
        done = run(directory, "pull", "small", "--json", "--progress", "json", **settings)
        assert done.returncode == 0, done.stderr
        (pulled,) = json.loads(done.stdout)["models"]
        yield Compiled(directory, settings, pulled, done.stderr, interrupted, left)


def interrupt_while_compiling(directory: Path, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `pull` of two models, and interrupt it as soon as there is an unfinished artifact of the first."""
    arguments = ("pull", "small", COPY, "--source", "huggingface", "--json", "--progress", "json")
    with start(directory, *arguments, **settings) as process:
        wait_until(lambda: process.poll() is not None or [*directory.glob("cache/artifacts/.*.tmp")])
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


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
    """Return settings, without their prefix, that point at the two hubs and at empty caches."""
    return {
        "CACHE_DIR": str(tmp_path / "cache"),
        "HF_CACHE_DIR": str(tmp_path / "hf"),
        "HF_ENDPOINT": huggingface.url,
        "MODELSCOPE_CACHE_DIR": str(tmp_path / "ms"),
        "MODELSCOPE_ENDPOINT": modelscope.url,
    }


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Settings]]:
    """Replace the service by one that ends at once; yield the list of the settings with which it was started."""
    started: list[Settings] = []
    monkeypatch.setattr("emb_model_provider.main.run", lambda **_: started.append(load_settings()[0]))
    before = dict(os.environ)
    yield started
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def here(tmp_path: Path, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give this process an empty working directory and home, and the environment of a user with `settings`."""
    variables = environment(tmp_path, **settings) | {
        "HOME": str(tmp_path / "home"),
        # Read when ModelScope's client is first imported. Its default of five tries takes 15 s.
        "MODELSCOPE_API_MAX_RETRIES": "1",
    }
    for name in [name for name in os.environ if name not in variables and name != "PYTEST_CURRENT_TEST"]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path
