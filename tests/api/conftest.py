"""Services with other settings than the defaults. Each is started once per session and backend."""

from __future__ import annotations

import json
import shutil
import socket
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.batch_jobs.database import open_database
from emb_model_provider.hubs.local import find_bundled
from tests.api.helpers import KEYS, MAPPING, ORIGIN, SECRETS, read_files, save_poisoned
from tests.hubs.servers import HuggingFaceServer, ModelScopeServer
from tests.kind_models import CLASSIFIERS, MULTI_VECTOR, RERANKERS, SPARSE, save_bge_m3
from tests.models import FAMILIES
from tests.service import BUNDLED, Service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sentence_transformers import SentenceTransformer


@pytest.fixture(scope="session")
def reference() -> SentenceTransformer:
    """Return the bundled model, loaded with sentence-transformers."""
    import torch
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(
        str(find_bundled()), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    )


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Iterator[Service]:
    """Yield a service with keys, CORS, low limits, strict input, and one model under several aliases.

    Its `http` client sends a valid key.
    """
    settings = {
        "CACHE_DIR": service_cache,
        "BACKEND": backend,
        "API_KEYS": ",".join(KEYS),
        "CORS_ORIGINS": ORIGIN,
        "ALLOWED_HOSTS": "localhost,emb.example:8443",
        "MODEL_MAPPING": json.dumps(MAPPING),
        "PRELOAD_MODELS": "mini,strict",
        "MAX_INPUTS": "20",
        "MAX_REQUEST_TOKENS": "2000",
        "MAX_BODY_MB": "0.25",
        "STRICT_INPUT": "true",
    }
    with Service(tmp_path_factory.mktemp("guarded"), **settings) as started:
        started.http.headers["authorization"] = f"Bearer {KEYS[0]}"
        yield started.wait()


@pytest.fixture(scope="session")
def kind_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the directories of small models, by the names that the service `kinds` gives them."""
    directory = tmp_path_factory.mktemp("kind-models")
    save = {
        "reranker": RERANKERS["bert"],
        "classifier": CLASSIFIERS["bert"],
        "splade": SPARSE["bert"],
        "colbert": MULTI_VECTOR["sentence-transformers"],
        "m3": save_bge_m3,
    }
    return {name: function(directory / name) for name, function in save.items()}


@pytest.fixture(scope="session")
def kinds(
    kind_directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str
) -> Iterator[Service]:
    """Yield a service with a small model of each kind. The default model is the reranker, which has several aliases.

    The other models run with torch, because tests of the backends compile such models.
    """
    entries: dict[str, dict[str, Any]] = {
        name: {"name": f"test/{name}", "path": str(path), "backend": "torch", "device": "cpu", "precision": "fp32"}
        for name, path in kind_directories.items()
    }
    entries["reranker"]["backend"] = backend
    mapping = {
        **entries,
        "reranker-raw": {**entries["reranker"], "raw_scores": True},
        "reranker-cut": {**entries["reranker"], "long_documents": "cut"},
    }
    settings = {"CACHE_DIR": service_cache, "MODEL_MAPPING": json.dumps(mapping)}
    with Service(tmp_path_factory.mktemp("kinds"), SERVE_CACHED="false", **settings) as started:
        yield started.wait()


@pytest.fixture(scope="session")
def empty_batch_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a database, because creating the tables takes longer than most tests."""
    directory = tmp_path_factory.mktemp("batches")
    open_database(None, directory).dispose()
    return directory


@pytest.fixture
def batch_database(empty_batch_database: Path, tmp_path: Path) -> Path:
    """Return a directory for batches, with an empty database."""
    shutil.copytree(empty_batch_database, tmp_path / "batch")
    return tmp_path / "batch"


@pytest.fixture(scope="session")
def silent_hub() -> Iterator[str]:
    """Yield the URL of a hub that accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="session")
def strained(
    tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str, silent_hub: str
) -> Iterator[Service]:
    """Yield a service with a short request timeout, a short queue, and models that fail.

    `mini` works, `poisoned` returns NaN for one text, `broken` cannot be loaded, `stuck` never finishes its download.
    """
    directory = tmp_path_factory.mktemp("strained")
    mapping = {
        "mini": {"name": BUNDLED},
        "poisoned": {"name": "poisoned", "path": str(save_poisoned(directory / "poisoned")), "backend": "torch"},
        "broken": {"name": "broken", "path": str(directory / "not-there")},
        "stuck": {"name": "test/stuck", "source": "huggingface", "endpoint": silent_hub},
    }
    settings = {
        "CACHE_DIR": service_cache,
        "BACKEND": backend,
        "MODEL_MAPPING": json.dumps(mapping),
        "PRELOAD_MODELS": "mini,poisoned,broken",
        "REQUEST_TIMEOUT_S": "5",
        "REQUEST_TOTAL_TIMEOUT_S": "5",
        "RESULT_CACHE_MB": "0",
        "MAX_QUEUE_TOKENS": "500",
        "MAX_BATCH_TOKENS": "512",
    }
    with Service(directory / "service", **settings) as started:
        started.wait_for_state("mini", "ready").wait_for_state("poisoned", "ready")
        yield started.wait_for_state("broken", "failed")


@pytest.fixture(scope="session")
def impatient(
    tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str, silent_hub: str
) -> Iterator[Service]:
    """Yield a service with short timeouts, admin keys, tokens, and a text log at DEBUG.

    `mini` works, `stuck` never finishes its download.
    """
    mapping = {
        "mini": {"name": BUNDLED, "token": SECRETS["mini"]},
        "stuck": {"name": "test/stuck", "source": "huggingface", "endpoint": silent_hub, "token": SECRETS["stuck"]},
    }
    settings = {
        "CACHE_DIR": service_cache,
        "BACKEND": backend,
        "MODEL_MAPPING": json.dumps(mapping),
        "PRELOAD_MODELS": "mini",
        "RECEIVE_TIMEOUT_S": "3",
        "REQUEST_TIMEOUT_S": "8",
        "ADMIN_API_KEYS": SECRETS["admin"],
        "HF_TOKEN": SECRETS["hf"],
        "MODELSCOPE_TOKEN": SECRETS["modelscope"],
        "LOG_LEVEL": "DEBUG",
        "LOG_FORMAT": "text",
    }
    with Service(tmp_path_factory.mktemp("impatient"), **settings) as started:
        yield started.wait()


@pytest.fixture(scope="session")
def hub() -> Iterator[HuggingFaceServer]:
    """Yield a Hugging Face server without repositories: each test adds its own."""
    with HuggingFaceServer({}) as server:
        yield server


@pytest.fixture(scope="session")
def modelscope() -> Iterator[ModelScopeServer]:
    """Yield a ModelScope server without repositories."""
    with ModelScopeServer({}) as server:
        yield server


@pytest.fixture(scope="session")
def managed(
    tmp_path_factory: pytest.TempPathFactory, hub: HuggingFaceServer, modelscope: ModelScopeServer
) -> Iterator[Service]:
    """Yield a service that loads no model at startup, with both hubs on this machine and all caches below `disk`."""
    directory = tmp_path_factory.mktemp("managed")
    settings = {
        "MODEL_MAPPING": json.dumps({"mini": {"name": BUNDLED}}),
        "PRELOAD_MODELS": "none",
        "MODEL_PRECISION": "fp32",
        "HF_ENDPOINT": hub.url,
        "HF_CACHE_DIR": str(directory / "disk" / "hf"),
        "MODELSCOPE_ENDPOINT": modelscope.url,
        "MODELSCOPE_CACHE_DIR": str(directory / "disk" / "ms"),
        "CACHE_DIR": str(directory / "disk" / "own"),
    }
    with Service(directory, **settings) as started:
        yield started.wait()


@pytest.fixture(scope="session")
def small_hub(hub: HuggingFaceServer, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceServer:
    """Return `hub` with two repositories of a small model that can be loaded: acme/small and acme/served.

    They have the same files, so that the model is compiled only once.
    """
    files = read_files(FAMILIES["bert-mean-normalize"](tmp_path_factory.mktemp("small") / "model"))
    hub.repos |= {"acme/small": dict(files), "acme/served": dict(files)}
    return hub
