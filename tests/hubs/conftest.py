"""Fixtures of the hubs' tests: the files of a tiny model, two servers, and settings that point to them."""

from __future__ import annotations

import json
import os
import random
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.settings import HubSettings
from tests.hubs.servers import HuggingFaceServer, ModelScopeServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# A setting of the client, which is read when it is first imported: five retries take 15 s until a 503 is reported.
os.environ.setdefault("MODELSCOPE_API_MAX_RETRIES", "1")

HF_REPO = "acme/tiny"
MS_REPO = "iic/tiny"
WEIGHTS = random.Random(7).randbytes(200_000)  # noqa: S311 - bytes that do not compress, the same each time


def model_files() -> dict[str, bytes]:
    """Return a sentence-transformers repository, with files that serving does not need."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    return {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": b"# tiny\n",
        "config.json": json.dumps({"model_type": "bert", "hidden_size": 8}).encode(),
        "modules.json": json.dumps(modules).encode(),
        "1_Pooling/config.json": b'{"word_embedding_dimension": 8}',
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": WEIGHTS[::-1],
        "onnx/model.onnx": WEIGHTS[:50_000],
        "tf_model.h5": WEIGHTS[:60_000],
    }


def modelscope_files() -> dict[str, bytes]:
    """Return a repository like those of ModelScope itself: torch weights and a configuration.json."""
    return {
        "README.md": "# 小模型\n".encode(),
        "config.json": json.dumps({"model_type": "bert", "hidden_size": 8}).encode(),
        "configuration.json": json.dumps({"task": "sentence-embedding"}).encode(),
        "vocab.txt": b"[PAD]\n[UNK]\n",
        "pytorch_model.bin": WEIGHTS,
        "resources/dual-encoder.png": WEIGHTS[:20_000],
    }


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty home directory for the clients; their environment variables are removed."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "MODELSCOPE_")) and name != "MODELSCOPE_API_MAX_RETRIES":
            monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def huggingface() -> Iterator[HuggingFaceServer]:
    with HuggingFaceServer({HF_REPO: model_files()}) as server:
        yield server


@pytest.fixture
def modelscope() -> Iterator[ModelScopeServer]:
    with ModelScopeServer({MS_REPO: modelscope_files()}) as server:
        yield server


@pytest.fixture
def settings(
    tmp_path: Path, huggingface: HuggingFaceServer, modelscope: ModelScopeServer
) -> Callable[..., HubSettings]:
    """Return a function that makes settings for the servers; keyword arguments take precedence."""

    def make(**changes: object) -> HubSettings:
        return HubSettings(
            **{
                "cache_dir": tmp_path / "cache",
                "hf_cache_dir": tmp_path / "hf",
                "hf_endpoint": huggingface.url,
                "modelscope_cache_dir": tmp_path / "ms",
                "modelscope_endpoint": modelscope.url,
                **changes,
            }
        )

    return make


def spec(name: str, **fields: object) -> ModelSpec:
    return ModelSpec(alias="tiny", name=name, **fields)
