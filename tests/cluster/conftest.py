"""An environment with Ray, in which programs also find the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from emb_model_provider import Embedder
from emb_model_provider.settings import Settings
from tests.clients.isolated import Environment
from tests.service import NO_NETWORK, environment


@pytest.fixture(scope="session")
def ray(tmp_path_factory: pytest.TempPathFactory, service_cache: str) -> Environment:
    # Compiled here, because actors that start at the same moment would wait for each other.
    Embedder(settings=Settings.from_values(cache_dir=service_cache, offline=True)).load().close()
    directory = tmp_path_factory.mktemp("ray")
    variables = environment(directory, CACHE_DIR=service_cache, OFFLINE="true") | {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else Ray finds `uv run pytest` among its parents, and starts its workers with `uv run pytest`, too.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # gRPC would send the connections between Ray's processes through the proxy, whose port is closed.
        **dict.fromkeys(NO_NETWORK, ""),
    }
    return Environment("ray", directory, variables, Path(__file__).with_name("isolated"), has_project=True)
