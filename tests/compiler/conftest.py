"""Compiled models, each compiled once per test run."""

from __future__ import annotations

from typing import Any

import pytest

from emb_model_provider.backends.openvino_cpu.infer_requests import ShortRequests
from tests.artifacts.helpers import CompiledModels, compiled_models


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledModels:
    return compiled_models(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def compiles_short_requests_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the graph for a length of short inputs when it is first needed, so that its results are compared, too."""

    def get(requests: ShortRequests, length: int) -> Any:
        if length not in requests._requests:
            requests._compile(length)
        return requests._requests.get(length)

    monkeypatch.setattr(ShortRequests, "get", get)
