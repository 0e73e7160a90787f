"""Models whose files would stop the service: it answers other requests meanwhile, and says what is wrong."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.backends.pytorch.test_repositories import edit
from tests.models import FAMILIES
from tests.service import BUNDLED, Service, assert_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

ENDLESS = "([a-z_.]+)+!"
"""A regular expression that takes longer than anyone waits for the name of a weight."""
PANIC = "a" * 40 + "b"
"""A text for which the library gives up the tokenizer's regular expression, with a panic."""
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, service_cache: str) -> Iterator[Service]:
    """Yield a service with the bundled model and models that are loaded at their first request."""
    root = tmp_path_factory.mktemp("hostile")

    def write(name: str, file: str, **values: Any) -> Path:
        directory = FAMILIES["bert-cls"](root / name)
        edit(directory / file, **values)
        return directory

    mapped = write("mapped", "sentence_bert_config.json", model_kwargs={"key_mapping": {ENDLESS: "x"}})
    panics = write("panics", "tokenizer.json", pre_tokenizer=SPLIT)
    mapping = {
        "mini": {"name": BUNDLED, "backend": "torch", "precision": "fp32"},
        "mapped-torch": {"path": str(mapped), "backend": "torch"},
        "mapped-openvino": {"path": str(mapped), "backend": "openvino"},
        "panics": {"path": str(panics), "backend": "torch", "precision": "fp32"},
    }
    settings = {"CACHE_DIR": service_cache, "MODEL_MAPPING": json.dumps(mapping), "PRELOAD_MODELS": "mini"}
    with Service(root / "service", **settings) as service:
        yield service.wait()


@pytest.mark.parametrize("alias", ["mapped-torch", "mapped-openvino"])
def test_regular_expression_of_a_repository_does_not_stop_the_service(hostile: Service, alias: str) -> None:
    """While the model is being loaded, others are answered. The error names the file and the option."""
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(hostile.embed, "hello", model=alias)
        while not answer.done():
            assert hostile.http.get("/health", timeout=30).status_code == 200
            assert hostile.http.post("/v1/embeddings", json={"input": "hello"}, timeout=30).status_code == 200
    error = answer.result()
    assert error.status_code == 503, error.text
    for text in (error.text, hostile.http.get("/ready").json()["models"][alias]["error"]):
        assert "sentence_bert_config.json" in text
        assert "key_mapping" in text


def test_panic_of_a_tokenizer_is_an_error_of_its_request(hostile: Service) -> None:
    """In the form of the API, with a request id. The service and the model go on."""
    assert hostile.embed("hello", model="panics").status_code == 200
    assert_error(hostile.embed(PANIC, model="panics"), 500, "internal_error", type="server_error")
    tokenized = hostile.http.post("/tokenize", json={"model": "panics", "prompt": PANIC})
    assert tokenized.status_code == 500
    assert tokenized.headers["x-request-id"]
    assert set(tokenized.json()) == {"error", "error_type"}  # the form of TEI
    assert hostile.embed("hello", model="panics").status_code == 200
    assert hostile.embed("hello", model="mini").status_code == 200
    assert hostile.process.poll() is None
