"""Rerankers: SDKs and frameworks, and the requests of applications. Scores are compared with those of CrossEncoder."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import cohere
import numpy as np
import pytest
import voyageai

from tests.clients.helpers import IGNORE_WARNINGS, KEY, run_with_dify
from tests.clients.isolated import Environment
from tests.kind_models import RERANKERS
from tests.service import COMMAND, NO_NETWORK, Service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = [pytest.mark.slow, IGNORE_WARNINGS]

RERANK_QUERY = "how do I reset it?"
DOCUMENTS = ["Open the settings and choose reset.", "The quick brown fox", "今天天气很好", "reset", "a garden"]
BODY = {"model": "reranker", "query": RERANK_QUERY, "documents": DOCUMENTS}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RERANKERS["bert"](tmp_path_factory.mktemp("reranker") / "model")


@pytest.fixture(scope="module")
def scores(directory: Path) -> NDArray[np.float32]:
    """Return the scores of the documents, computed with sentence-transformers."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(directory), device="cpu", local_files_only=True)
    pairs = [(RERANK_QUERY, document) for document in DOCUMENTS]
    predicted = np.asarray(model.predict(pairs, show_progress_bar=False), dtype=np.float32)
    assert np.ptp(predicted) > 0.01
    return predicted


@pytest.fixture(scope="module")
def rerankers(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str
) -> Iterator[Service]:
    """Yield a service with a key, whose default model is a reranker."""
    entry = {"name": "test/reranker", "path": str(directory), "precision": "fp32"}
    mapping = {"reranker": entry, "logits": {**entry, "raw_scores": True}}
    settings = {"CACHE_DIR": service_cache, "BACKEND": backend, "MODEL_MAPPING": json.dumps(mapping), "API_KEYS": KEY}
    command = ["env", *(f"{name}={value}" for name, value in NO_NETWORK.items()), *COMMAND]
    with Service(tmp_path_factory.mktemp("rerankers"), command=command, SERVE_CACHED="false", **settings) as started:
        started.http.headers["authorization"] = f"Bearer {KEY}"
        yield started.wait()


def assert_ranking(ranking: Any, scores: NDArray[np.float32]) -> None:
    """Check the order of pairs of a place and a score, and the scores by value."""
    order = np.argsort(-scores, kind="stable")[: len(ranking)]
    assert [index for index, _ in ranking] == order.tolist()
    np.testing.assert_allclose([score for _, score in ranking], scores[order], atol=1e-4)


def of_results(results: Any) -> list[tuple[int, float]]:
    return [(each.index, each.relevance_score) for each in results]


def test_cohere(rerankers: Service, scores: NDArray[np.float32]) -> None:
    """Versions 1 and 2 of the API, with and without `/v1` in the URL."""
    for path in ("", "/v1"):
        one = cohere.Client(api_key=KEY, base_url=f"{rerankers.url}{path}")
        response = one.rerank(**BODY, return_documents=True)
        assert_ranking(of_results(response.results), scores)
        assert [each.document.text for each in response.results if each.document] == [
            DOCUMENTS[each.index] for each in response.results
        ]
        two = cohere.ClientV2(api_key=KEY, base_url=f"{rerankers.url}{path}")
        first = two.rerank(**BODY, top_n=2)
        assert len(first.results) == 2
        assert_ranking(of_results(first.results), scores)
        assert first.meta is not None
        assert first.meta.tokens is not None
        assert first.meta.tokens.input_tokens
    with pytest.raises(cohere.NotFoundError, match="The model `nope` does not exist"):
        two.rerank(model="nope", query="x", documents=["y"])
    with pytest.raises(cohere.UnauthorizedError, match="Incorrect API key"):
        cohere.ClientV2(api_key="x", base_url=rerankers.url).rerank(**BODY)


async def test_cohere_asynchronous(rerankers: Service, scores: NDArray[np.float32]) -> None:
    client = cohere.AsyncClientV2(api_key=KEY, base_url=rerankers.url)
    assert_ranking(of_results((await client.rerank(**BODY)).results), scores)


def test_cohere_for_javascript(rerankers: Service, scores: NDArray[np.float32], packages: Path) -> None:
    argument = json.dumps({"url": rerankers.url, "key": KEY, "query": RERANK_QUERY, "documents": DOCUMENTS})
    command = ["node", "rerank.mjs", argument]
    done = subprocess.run(command, cwd=packages, capture_output=True, encoding="utf-8", timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for ranking in (*results["rankings"].values(), results["first"]):
        assert_ranking(ranking, scores)
    assert len(results["first"]) == 2
    assert results["documents"] == [DOCUMENTS[index] for index, _ in results["rankings"]["version 1"]]
    assert results["tokens"] > 0
    assert (results["error"]["name"], results["error"]["status"]) == ("NotFoundError", 404)
    assert "The model `nope` does not exist" in results["error"]["message"]


async def test_voyage(rerankers: Service, scores: NDArray[np.float32]) -> None:
    """The SDK reads `data` and the number of tokens."""
    client = voyageai.Client(api_key=KEY, base_url=f"{rerankers.url}/v1", max_retries=0)  # type: ignore[attr-defined]
    found = client.rerank(RERANK_QUERY, DOCUMENTS, model="reranker")
    assert_ranking(of_results(found.results), scores)
    assert [each.document for each in found.results] == [DOCUMENTS[each.index] for each in found.results]
    assert found.total_tokens > 0
    asynchronous = voyageai.AsyncClient(api_key=KEY, base_url=f"{rerankers.url}/v1")  # type: ignore[attr-defined]
    first = await asynchronous.rerank(RERANK_QUERY, DOCUMENTS, model="reranker", top_k=2, truncation=True)
    assert len(first.results) == 2
    assert_ranking(of_results(first.results), scores)


def test_litellm(rerankers: Service, scores: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> None:
    """With each of the providers for servers of one's own; `huggingface` has the API of TEI."""
    # LiteLLM downloads its table of prices otherwise.
    environment = Environment("litellm", tmp_path_factory.mktemp("litellm"), {"LITELLM_LOCAL_MODEL_COST_MAP": "True"})
    results = environment.run("litellm_rerank", url=rerankers.url, key=KEY, query=RERANK_QUERY, documents=DOCUMENTS)
    assert "The model `nope` does not exist" in results["error"]
    rankings = results["rankings"]
    assert len(rankings.pop("first two")) == 2
    for provider, ranking in rankings.items():
        assert len(ranking) == len(DOCUMENTS), provider
        assert_ranking(ranking, scores)


def test_frameworks(rerankers: Service, scores: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> None:
    """The rankers of Haystack, LlamaIndex, pymilvus and LightRAG, and the SDK of DashScope."""
    environment = Environment("rerankers", tmp_path_factory.mktemp("rerankers-packages"), {})
    rankings = environment.run("rerankers", url=rerankers.url, key=KEY, query=RERANK_QUERY, documents=DOCUMENTS)
    assert len(rankings) == 10
    for name, ranking in rankings.items():
        assert len(ranking) == len(DOCUMENTS), name
        assert_ranking(ranking, scores)


def test_dify(rerankers: Service, scores: NDArray[np.float32]) -> None:
    """The class of the plugin SDK, under each URL. It scales the scores so that they range from 0 to 1."""
    results = run_with_dify("dify_rerank", url=rerankers.url, key=KEY, query=RERANK_QUERY, documents=DOCUMENTS)
    scaled = (scores - scores.min()) / np.ptp(scores)
    for ranking in results["rankings"].values():
        assert len(ranking) == len(DOCUMENTS)
        order = np.argsort(-scores, kind="stable")
        assert [index for index, _ in ranking] == order.tolist()
        np.testing.assert_allclose([score for _, score in ranking], scaled[order], atol=1e-3)
    assert "404" in results["error"]


def test_ragflow(rerankers: Service, scores: NDArray[np.float32]) -> None:
    """Booleans are texts, and the number of tokens is in `usage` or `tokens`."""
    for path in ("/v1/rerank", "/rerank", "/v1/reranks"):
        body = {**BODY, "return_documents": "true", "return_len": "true", "top_n": len(DOCUMENTS)}
        answer = rerankers.http.post(path, json=body).json()
        assert_ranking([(each["index"], each["relevance_score"]) for each in answer["results"]], scores)
        assert len(answer["results"]) == len(DOCUMENTS)
        assert answer["usage"]["total_tokens"] == answer["tokens"]["input_tokens"] > 0
        assert answer["tokens"]["output_tokens"] == 0


def test_fastgpt(rerankers: Service, scores: NDArray[np.float32]) -> None:
    """It takes the results in the order of the response, and counts the tokens in `meta`."""
    answer = rerankers.http.post("/v1/rerank", json=BODY).json()
    assert answer["id"]
    assert answer["meta"]["tokens"]["input_tokens"] > 0
    assert_ranking([(each["index"], each["relevance_score"]) for each in answer["results"]], scores)


def test_open_webui(rerankers: Service, scores: NDArray[np.float32]) -> None:
    """It posts to the URL as it is, sorts the results by `index`, and needs one for each document."""
    body = {**BODY, "top_n": len(DOCUMENTS)}
    results = rerankers.http.post("/v1/rerank", json=body).json()["results"]
    by_index = sorted(results, key=lambda each: each["index"])
    assert [each["index"] for each in by_index] == list(range(len(DOCUMENTS)))
    np.testing.assert_allclose([each["relevance_score"] for each in by_index], scores, atol=1e-4)


def test_logits_by_alias(rerankers: Service, scores: NDArray[np.float32]) -> None:
    """For applications that apply a sigmoid themselves, and send no fields of this service."""
    client = cohere.ClientV2(api_key=KEY, base_url=rerankers.url)
    found = of_results(client.rerank(**{**BODY, "model": "logits"}).results)
    assert_ranking([(index, float(1 / (1 + np.exp(-logit)))) for index, logit in found], scores)
    assert max(abs(logit) for _, logit in found) > 1
