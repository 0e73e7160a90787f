"""Chroma's embedding functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.clients.helpers import KEY, TEXTS, Reference, assert_vectors
from tests.clients.isolated import Environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.service import Service


@pytest.mark.slow
def test_embedding_functions(clients: Service, reference: Reference, tmp_path: Path) -> None:
    """Those for OpenAI, Ollama and text-embeddings-inference, and a collection that stores and finds the texts."""
    result = Environment("chroma", tmp_path, {}).run("chroma_functions", url=clients.url, key=KEY, texts=TEXTS)
    assert result.pop("nearest") == [str(number) for number in range(len(TEXTS))]
    assert list(result) == ["openai", "ollama", "huggingface", "collection"]
    for vectors in result.values():
        assert_vectors(vectors, reference(*TEXTS))
