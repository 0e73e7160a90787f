"""One service for the SDKs of all APIs, and the reference for its vectors."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from emb_model_provider.hubs.local import find_bundled
from tests.clients.helpers import DOCUMENT, KEY, QUERY, Reference
from tests.service import BUNDLED, COMMAND, NO_NETWORK, Service

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def clients(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Iterator[Service]:
    """Yield a service with a key, and a model that has prompts and several aliases."""
    entry = {
        "name": BUNDLED,
        "precision": "fp32",
        "prompts": {"query": QUERY, "document": DOCUMENT},
        "dimensions": "any",
    }
    mapping: dict[str, dict[str, Any]] = {
        "mini": {**entry, "aliases": ["text-embedding-3-small", "text-embedding-ada-002", "nomic-embed-text"]},
        "for-queries": {**entry, "input_type": "query"},
    }
    settings = {"CACHE_DIR": service_cache, "BACKEND": backend, "MODEL_MAPPING": json.dumps(mapping), "API_KEYS": KEY}
    # No client needs more than this service, which therefore gets no network.
    command = ["env", *(f"{name}={value}" for name, value in NO_NETWORK.items()), *COMMAND]
    with Service(tmp_path_factory.mktemp("clients"), command=command, **settings) as started:
        started.http.headers["authorization"] = f"Bearer {KEY}"
        yield started.wait()


@pytest.fixture(scope="session")
def reference() -> Reference:
    """Return a function that embeds texts with sentence-transformers."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(find_bundled()), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    )
    return lambda *texts, prompt="": np.asarray(model.encode([prompt + text for text in texts]), dtype=np.float32)


@pytest.fixture(scope="session")
def packages(pytestconfig: pytest.Config) -> Path:
    """Return a directory with the scripts and their packages. pytest's cache keeps it for the next run."""
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found: install Node.js 18 or later to test the SDKs for JavaScript")
    assert pytestconfig.cache is not None
    directory = pytestconfig.cache.mkdir("node-packages")
    shutil.copytree(Path(__file__).with_name("node"), directory, dirs_exist_ok=True)
    # Only packages are downloaded: no script of a package runs during the installation.
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
    subprocess.run(command, cwd=directory, check=True, stdin=subprocess.DEVNULL, timeout=500)
    return directory


@pytest.fixture(autouse=True)
def closed_connections() -> Iterator[None]:
    """Close the connections of SDKs that cannot be closed, because their warnings would fail a later test."""
    yield
    gc.collect()
