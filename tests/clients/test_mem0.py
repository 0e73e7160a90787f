"""The embedders of mem0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.clients.helpers import KEY, TEXTS, Reference, assert_vectors
from tests.clients.isolated import Environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.service import Service


@pytest.mark.slow
def test_embedders(clients: Service, reference: Reference, tmp_path: Path) -> None:
    """Those for OpenAI and Ollama, with single texts and in batches."""
    environment = Environment("mem0", tmp_path, {"MEM0_TELEMETRY": "False", "MEM0_DIR": str(tmp_path)})
    result = environment.run("mem0_embedders", url=clients.url, key=KEY, texts=TEXTS)
    assert list(result) == ["openai", "openai batch", "ollama", "ollama batch"]
    for vectors in result.values():
        assert_vectors(vectors, reference(*TEXTS))
