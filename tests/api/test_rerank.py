"""`POST /v1/rerank`, and what a reranker answers to other requests."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from sentence_transformers import CrossEncoder

from tests.kind_checks import QUERY
from tests.kind_models import RERANKERS
from tests.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOCUMENTS = ["Open the settings and choose reset.", "The quick brown fox", "今天天气很好", "reset"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RERANKERS["bert"](tmp_path_factory.mktemp("reranker") / "model")


@pytest.fixture(scope="module")
def reranking(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str
) -> Iterator[Service]:
    mapping = {"reranker": {"name": "test/reranker", "path": str(directory), "precision": "fp32"}}
    with Service(
        tmp_path_factory.mktemp("reranking"),
        CACHE_DIR=service_cache,
        BACKEND=backend,
        MODEL_MAPPING=json.dumps(mapping),
        PRELOAD_MODELS="reranker",
    ) as started:
        yield started.wait()


def test_documents_are_sorted_by_their_scores(reranking: Service, directory: Path) -> None:
    model = CrossEncoder(str(directory), device="cpu", local_files_only=True)
    expected = model.predict([(QUERY, text) for text in DOCUMENTS], show_progress_bar=False)
    body = {"model": "reranker", "query": QUERY, "documents": [*DOCUMENTS[:2], {"text": DOCUMENTS[2]}, DOCUMENTS[3]]}
    answer = reranking.http.post("/v1/rerank", json={**body, "return_documents": True}).json()
    results = answer["results"]
    assert [each["index"] for each in results] == sorted(range(4), key=lambda index: -expected[index])
    for each in results:
        assert each["relevance_score"] == pytest.approx(expected[each["index"]], abs=1e-3)
        assert each["document"] == {"text": DOCUMENTS[each["index"]]}
    assert answer["usage"]["total_tokens"] == answer["tokens"]["input_tokens"] > 20
    first = reranking.http.post("/v1/rerank", json={**body, "top_n": 1}).json()["results"]
    assert [each["index"] for each in first] == [results[0]["index"]]


def test_a_model_that_cannot_do_it_says_what_it_can(reranking: Service) -> None:
    embedding = reranking.http.post("/v1/embeddings", json={"model": "reranker", "input": "x"})
    assert embedding.status_code == 400
    assert embedding.json()["error"]["code"] == "unsupported_task"
    assert "'rerank'" in embedding.json()["error"]["message"]


def test_the_playground_reranks(reranking: Service) -> None:
    """With the scores of `POST /v1/rerank`, and with code that sends this request. A reranker has no vectors to compare."""
    body = {"model": "reranker", "query": QUERY, "documents": DOCUMENTS}
    results = reranking.http.post("/v1/rerank", json=body).json()["results"]
    page = reranking.http.get("/console/playground?mode=search").text
    assert re.search(r'<select name="reranker">.*<option>reranker</option>', page)
    assert re.search(r'<select name="model"></select>', page)
    form = {"mode": "search", "reranker": "reranker", "query": QUERY, "documents": "\n".join(DOCUMENTS)}
    text = reranking.http.post("/console/playground", data=form, headers={"hx-request": "true"}).text
    rows = re.findall(r'<td class="number">(-?\d\.\d{3})<meter.*?</td><td>(.*?)</td>', text)
    assert rows == [(f"{each['relevance_score']:.3f}", DOCUMENTS[each["index"]]) for each in results]
    curl, python, javascript = (
        html.unescape(code) for code in re.findall(r'<code id="code-[^>]*>(.*?)</code>', text, re.DOTALL)
    )
    output = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True).stdout
    assert json.loads(output)["results"] == results
    output = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, check=True).stdout
    assert [int(line.split()[0]) for line in output.splitlines()] == [each["index"] for each in results]
    assert "/v1/rerank" in javascript
    wrong = reranking.http.post(
        "/console/playground", data={"model": "reranker", "texts": "a\nb"}, headers={"hx-request": "true"}
    )
    assert (wrong.status_code, wrong.headers["hx-retarget"]) == (400, "#notice")


def test_the_model_is_described(reranking: Service) -> None:
    """With its kind, its tasks, and how close its scores are to those at fp32."""
    model = reranking.http.get("/v1/models/reranker").json()
    assert (model["kind"], model["tasks"], model["dimensions"]) == ("reranker", ["rerank"], None)
    if model["backend"] == "openvino":
        assert model["fidelity"]["min_cosine"] is None
        assert model["fidelity"]["scores"]["max_difference"] < 1e-3
        assert model["fidelity"]["agreement"]["scores"] > 0.999
