"""Services that differ from the default one, and what they serve; each is started once per session and backend."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import pytest

from tests.api.models import KEYS, MAPPING, ORIGIN, SECRETS, bundled_directory, save_poisoned
from tests.service import BUNDLED, Service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sentence_transformers import SentenceTransformer


@pytest.fixture(scope="session")
def reference() -> SentenceTransformer:
    """Return sentence-transformers' own reading of the bundled model."""
    import torch
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(
        str(bundled_directory()), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    )


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Iterator[Service]:
    """Yield a service with keys, CORS, small limits, strict input, and one model under several aliases.

    Its `http` client sends a good key.
    """
    settings = {
        "CACHE_DIR": service_cache,
        "BACKEND": backend,
        "API_KEYS": ",".join(KEYS),
        "CORS_ORIGINS": ORIGIN,
        "ALLOWED_HOSTS": "localhost,emb.example:8443",
        "MODEL_MAPPING": json.dumps(MAPPING),
        "PRELOAD_MODELS": "mini,half",
        "MAX_INPUTS": "20",
        "MAX_REQUEST_TOKENS": "2000",
        "MAX_BODY_MB": "0.25",
        "STRICT_INPUT": "true",
    }
    with Service(tmp_path_factory.mktemp("guarded"), **settings) as started:
        started.http.headers["authorization"] = f"Bearer {KEYS[0]}"
        yield started.wait()


@pytest.fixture(scope="session")
def strained(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Iterator[Service]:
    """Yield a service with little time and a short queue, and with models that have gone wrong.

    `mini` is well, `poisoned` gives NaN for one word, `broken` could not be loaded, `stuck` never finishes its
    download.
    """
    directory = tmp_path_factory.mktemp("strained")
    # Connections to it are made by the system and never answered.
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        mapping = {
            "mini": {"name": BUNDLED},
            "poisoned": {
                "name": "poisoned",
                "path": str(save_poisoned(directory / "poisoned")),
                "backend": "torch",
            },
            "broken": {"name": "broken", "path": str(directory / "not-there")},
            "stuck": {
                "name": "test/stuck",
                "source": "huggingface",
                "endpoint": f"http://127.0.0.1:{silent_hub.getsockname()[1]}",
            },
        }
        settings = {
            "CACHE_DIR": service_cache,
            "BACKEND": backend,
            "MODEL_MAPPING": json.dumps(mapping),
            "PRELOAD_MODELS": "mini,poisoned,broken",
            "REQUEST_TIMEOUT_S": "5",
            "MAX_QUEUE_TOKENS": "500",
            "MAX_BATCH_TOKENS": "512",
        }
        with Service(directory / "service", **settings) as started:
            started.wait_for_state("mini", "ready").wait_for_state("poisoned", "ready")
            yield started.wait_for_state("broken", "failed")


@pytest.fixture(scope="session")
def edge(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Iterator[Service]:
    """Yield a service that has little patience with its clients, keys for admin routes, and much to keep secret.

    `mini` is well, `stuck` never finishes its download. It logs all that it can, as text.
    """
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        endpoint = f"http://127.0.0.1:{silent_hub.getsockname()[1]}"
        mapping = {
            "mini": {"name": BUNDLED, "token": SECRETS["mini"]},
            "stuck": {
                "name": "test/stuck",
                "source": "huggingface",
                "endpoint": endpoint,
                "token": SECRETS["stuck"],
            },
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
        with Service(tmp_path_factory.mktemp("edge"), **settings) as started:
            yield started.wait()
