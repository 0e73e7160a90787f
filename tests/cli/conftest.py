"""What the shell's tests share: hubs on this machine, and settings that point at them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.running import run
from tests.hubs.conftest import HF_REPO, MS_REPO, model_files, modelscope_files
from tests.hubs.servers import HuggingFaceServer, ModelScopeServer
from tests.models import FAMILIES
from tests.service import environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
    phases: list[str]
    """What `pull` did, in its order."""


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
        done = run(directory, "pull", "small", "--json", "--progress", "json", **settings)
        assert done.returncode == 0, done.stderr
        (pulled,) = json.loads(done.stdout)["models"]
        phases = [json.loads(line).get("phase") for line in done.stderr.splitlines()]
        yield Compiled(directory, settings, pulled, list(dict.fromkeys(filter(None, phases))))


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
