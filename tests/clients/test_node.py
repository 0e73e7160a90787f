"""The SDKs for JavaScript: OpenAI, Vercel AI, Ollama, Cohere and LangChain.

Each script in `node/` runs one SDK from npm, and prints its results as JSON.
"""

from __future__ import annotations

import json
import subprocess
from base64 import b64decode
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.clients.helpers import (
    DOCUMENT,
    IGNORE_WARNINGS,
    KEY,
    QUERY,
    TEXTS,
    Reference,
    assert_types,
    assert_vectors,
    shortened,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.service import Service

pytestmark = [pytest.mark.slow, IGNORE_WARNINGS]

NAMES = ["mini", "text-embedding-3-small", "text-embedding-ada-002", "nomic-embed-text", "for-queries"]
"""The models of the service."""


@pytest.fixture
def run(packages: Path, clients: Service) -> Callable[[str], Any]:
    """Return a function that runs a script against the service, and returns its results."""

    def run_script(name: str) -> Any:
        argument = json.dumps({"url": clients.url, "key": KEY, "texts": TEXTS})
        command = ["node", f"{name}.mjs", argument]
        done = subprocess.run(command, cwd=packages, capture_output=True, encoding="utf-8", timeout=240)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run_script


def test_openai(run: Callable[[str], Any], reference: Reference) -> None:
    """The SDK decodes base64, and gets numbers if it asks for them; Azure's client sends the key in `api-key`."""
    results = run("openai")
    vectors = reference(*TEXTS)
    for actual in results["vectors"].values():
        assert_vectors(actual, vectors)
    assert_vectors([np.frombuffer(b64decode(text), dtype="<f4") for text in results["base64"]], vectors)
    assert_vectors(results["shortened"], shortened(vectors, 64))
    assert_vectors(results["query"], reference(*TEXTS, prompt=QUERY))
    assert results["models"] == NAMES
    assert {case: error.pop("message") for case, error in results["errors"].items()} == {
        "unknown model": f"404 The model `nope` does not exist. Served here: {', '.join(NAMES)}.",
        "wrong key": "401 Incorrect API key provided.",
    }
    assert results["errors"] == {
        "unknown model": {"name": "NotFoundError", "status": 404, "code": "model_not_found"},
        "wrong key": {"name": "AuthenticationError", "status": 401, "code": "invalid_api_key"},
    }


def test_vercel_ai(run: Callable[[str], Any], reference: Reference) -> None:
    """Both providers of the AI SDK get the vectors, shorter ones, and the message of an error."""
    results = run("ai")
    vectors = reference(*TEXTS)
    for provider in ("openai", "compatible"):
        assert_vectors(results["vectors"][provider], vectors)
        assert_vectors(results["shortened"][provider], shortened(vectors, 64))
        error = results["errors"][provider]
        assert (error["name"], error["status"]) == ("AI_APICallError", 404)
        assert "The model `nope` does not exist" in error["message"]
    assert_vectors([results["query"]], reference(TEXTS[0], prompt=QUERY))


def test_ollama(run: Callable[[str], Any], reference: Reference) -> None:
    """The SDK gets vectors, models and errors, under names with and without a tag."""
    results = run("ollama")
    vectors = reference(*TEXTS)
    for actual in results["vectors"].values():
        assert_vectors(actual, vectors)
    assert_vectors(results["shortened"], shortened(vectors, 64))
    assert_vectors([results["older route"]], vectors[:1])
    assert results["models"] == NAMES
    assert results["capabilities"] == ["embedding"]
    assert results["version"]
    errors = {case: (error["name"], error["status"]) for case, error in results["errors"].items()}
    assert errors == {
        "unknown model": ("ResponseError", 404),
        "forbidden truncation": ("ResponseError", 400),
        "missing key": ("ResponseError", 401),
    }
    assert "The model `nope` does not exist" in results["errors"]["unknown model"]["message"]


def test_cohere(run: Callable[[str], Any], clients: Service, reference: Reference) -> None:
    """Both versions of the API return all types of vectors, with the prompt that `inputType` chooses."""
    results = run("cohere")
    vectors = reference(*TEXTS, prompt=QUERY)
    model = clients.http.get("/v1/models/mini").json()
    assert_vectors(results["vectors"], vectors)
    for types in results["types"].values():
        encoded = types.pop("base64")
        assert_vectors([np.frombuffer(b64decode(text), dtype="<f4") for text in encoded], vectors)
        assert types.keys() == {"float", "int8", "uint8", "binary", "ubinary"}
        assert_types(types, vectors, model)
    assert_types(results["shortened"], shortened(vectors, 64), model)
    assert_vectors(results["documents"], reference(*TEXTS, prompt=DOCUMENT))
    errors = {case: (error["name"], error["status"]) for case, error in results["errors"].items()}
    assert errors == {"unknown model": ("NotFoundError", 404), "wrong key": ("UnauthorizedError", 401)}
    assert "The model `nope` does not exist" in results["errors"]["unknown model"]["message"]


def test_langchain(run: Callable[[str], Any], reference: Reference) -> None:
    """OpenAIEmbeddings of LangChain returns the vectors of documents and queries."""
    results = run("langchain")
    for actual in results["vectors"].values():
        assert_vectors(actual, reference(*TEXTS))
    assert_vectors([results["query"]], reference(TEXTS[0], prompt=QUERY))
    error = results["errors"]["unknown model"]
    assert error["status"] == 404
    assert "The model `nope` does not exist" in error["message"]


def test_applications(run: Callable[[str], Any], reference: Reference) -> None:
    """FastGPT, AnythingLLM and n8n get the vectors, and n8n the list of models."""
    results = run("applications")
    vectors = reference(*TEXTS)
    for actual in results["vectors"].values():
        assert_vectors(actual, vectors)
    assert_vectors(results["anythingllm"], np.tile(vectors, (125, 1)))
    for result in results["n8n"].values():
        assert result["models"] == NAMES
        assert_vectors(result["vectors"], vectors)
