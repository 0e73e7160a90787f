"""The routes of rerankers: `/v1/rerank` in the forms of its callers, `/v1/score`, TEI's, Cohere's and DashScope's."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder

from tests.kind_checks import QUERY
from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.service import Service

    Reference = Callable[..., NDArray[np.float32]]

DOCUMENTS = ["Open the settings and choose reset.", "The quick brown fox", "今天天气很好", "reset"]
LONG = "settings password reset account menu button phone email number window house garden river train " * 6
"""Does not fit next to the query."""
BODY = {"model": "reranker", "query": QUERY, "documents": DOCUMENTS}
PATHS = [
    "/v1/rerank", "/rerank", "/v2/rerank", "/v1/reranks", "/reranks", "/v1/v1/rerank", "/v1/rerank/rerank", "/v1/rerank/v1/rerank",
    "//v1/rerank", "/v1/rerank/", "/v1/v2/rerank", "/rerank/rerank", "/api/v1/rerank", "/compatible-api/v1/reranks",
]  # fmt: skip
DASHSCOPE = "/api/v1/services/rerank/text-rerank/text-rerank"


@pytest.fixture(scope="module")
def reference(kind_directories: dict[str, Path]) -> Reference:
    """Return a function that scores documents with sentence-transformers."""
    model = CrossEncoder(str(kind_directories["reranker"]), device="cpu", local_files_only=True)

    def predict(query: str, documents: Sequence[str], *, raw: bool = False, cut: bool = False) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = model.predict(
            [(query, text) for text in documents],
            activation_fn=torch.nn.Identity() if raw else None,
            show_progress_bar=False,
            processing_kwargs={"text": {"truncation": "only_second"}} if cut else None,
        )
        return scores

    return predict


def post(service: Service, path: str, body: Any) -> Any:
    response = service.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def assert_ranked(results: Any, expected: NDArray[np.float32], *, key: str = "relevance_score") -> None:
    """Check the order and the scores of results, by value."""
    assert [each["index"] for each in results] == np.argsort(-expected, kind="stable").tolist()
    np.testing.assert_allclose([each[key] for each in results], np.sort(expected)[::-1], atol=1e-3)


def test_documents_are_sorted_by_their_scores(kinds: Service, reference: Reference) -> None:
    """The body has what the clients of Jina, Cohere, Voyage, Dify, FastGPT and RAGFlow read."""
    documents = [*DOCUMENTS[:2], {"text": DOCUMENTS[2], "title": "x"}, DOCUMENTS[3]]
    body = post(kinds, "/v1/rerank", {**BODY, "documents": documents, "return_documents": True})
    assert list(body) == ["id", "object", "model", "results", "data", "usage", "meta", "tokens"]
    assert (body["object"], body["model"]) == ("list", "reranker")
    assert_ranked(body["results"], reference(QUERY, DOCUMENTS))
    assert [each["document"] for each in body["results"]] == [
        {"text": DOCUMENTS[each["index"]]} for each in body["results"]
    ]
    assert [{**each, "document": {"text": each["document"]}} for each in body["data"]] == body["results"]
    count = body["usage"]["total_tokens"]
    assert count > 20
    assert body["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert body["tokens"] == body["meta"]["tokens"] == {"input_tokens": count, "output_tokens": 0}
    assert body["meta"]["billed_units"] == {"search_units": 1}


@pytest.mark.parametrize("path", PATHS)
def test_spellings_of_the_url(kinds: Service, reference: Reference, path: str) -> None:
    body = post(kinds, path, BODY)
    assert_ranked(body["results"], reference(QUERY, DOCUMENTS))
    assert "document" not in body["results"][0]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_n": None, "return_documents": True},
        {"return_documents": "true", "return_len": True, "top_n": len(DOCUMENTS)},
        {"return_documents": "False", "max_chunks_per_doc": 10, "rank_fields": ["text"], "user": "x"},
        {"top_k": None, "truncation": True},
        {"top_n": 100, "overlap_tokens": 80, "raw_scores": False, "truncation_direction": "Right"},
    ],
    ids=["Dify", "RAGFlow", "Cohere", "Voyage", "others"],
)
def test_fields_of_callers(kinds: Service, reference: Reference, fields: dict[str, Any]) -> None:
    """Booleans may be texts, null means absent, and unknown fields are ignored."""
    results = post(kinds, "/v1/rerank", {**BODY, **fields})["results"]
    assert_ranked(results, reference(QUERY, DOCUMENTS))
    with_documents = str(fields.get("return_documents")).lower() == "true"
    assert all(("document" in each) == with_documents for each in results)


@pytest.mark.parametrize("name", ["top_n", "top_k"])
def test_only_the_best_documents(kinds: Service, reference: Reference, name: str) -> None:
    body = post(kinds, "/v1/rerank", {**BODY, name: 2})
    order = np.argsort(-reference(QUERY, DOCUMENTS), kind="stable").tolist()
    assert [each["index"] for each in body["results"]] == [each["index"] for each in body["data"]] == order[:2]


def test_tei(kinds: Service, reference: Reference) -> None:
    """`texts` in the place of `documents` gets TEI's array. TEI's clients name no model."""
    scores = reference(QUERY, DOCUMENTS)
    for path in ("/rerank", "/v1/rerank"):
        results = post(kinds, path, {"query": QUERY, "texts": DOCUMENTS, "truncate": True})
        assert_ranked(results, scores, key="score")
        assert set(results[0]) == {"index", "score"}
    fields = {"return_text": True, "raw_scores": True}
    results = post(kinds, "/rerank", {"query": QUERY, "texts": DOCUMENTS, **fields})
    assert_ranked(results, reference(QUERY, DOCUMENTS, raw=True), key="score")
    assert [each["text"] for each in results] == [DOCUMENTS[each["index"]] for each in results]


def test_aliases_differ_in_their_scores(kinds: Service, reference: Reference) -> None:
    """The alias decides whether scores are logits, unless the request does. All aliases are one model in memory."""
    logits, scores = reference(QUERY, DOCUMENTS, raw=True), reference(QUERY, DOCUMENTS)
    assert np.ptp(logits) > 1
    for name, raw, expected in (
        ("reranker", None, scores),
        ("reranker", True, logits),
        ("reranker", "true", logits),
        ("reranker-raw", None, logits),
        ("reranker-raw", False, scores),
        ("test/reranker", None, scores),
    ):
        assert_ranked(post(kinds, "/v1/rerank", {**BODY, "model": name, "raw_scores": raw})["results"], expected)
    served = {model["alias"]: model["more_aliases"] for model in kinds.http.get("/api/models").json()["models"]}
    assert served["reranker"] == ["reranker-raw", "reranker-cut"]
    assert set(served) == {"reranker", "classifier", "splade", "colbert", "m3"}


def test_long_documents(kinds: Service, reference: Reference) -> None:
    """The best window counts, unless the alias or the request says that the document is cut, or rejected."""
    documents = [LONG, DOCUMENTS[0]]
    cut = reference(QUERY, documents, cut=True)
    for fields in ({"model": "reranker-cut"}, {"truncate": "END"}, {"model": "reranker-cut", "truncate": True}):
        assert_ranked(post(kinds, "/v1/rerank", {**BODY, "documents": documents, **fields})["results"], cut)
    response = kinds.http.post("/v1/rerank", json={**BODY, "documents": documents, "model": "reranker-cut"})
    assert response.headers["x-truncated-inputs"] == "1"
    whole = post(kinds, "/v1/rerank", {**BODY, "documents": documents})
    by_index = {each["index"]: each["relevance_score"] for each in whole["results"]}
    assert by_index[1] == pytest.approx(cut[1], abs=1e-3)
    assert by_index[0] > cut[0] + 1e-3, "a later window of the document has a higher score"
    assert whole["usage"]["total_tokens"] > 2 * 48
    for value in (False, "NONE"):
        response = kinds.http.post("/v1/rerank", json={**BODY, "documents": documents, "truncate": value})
        assert_error(response, 400, "context_length_exceeded", param="documents", phrase="'documents[0]'")


def test_max_tokens_per_doc(kinds: Service, reference: Reference) -> None:
    """What is beyond it is not read: two words of this document are two tokens."""
    body = {**BODY, "documents": ["reset password house garden", *DOCUMENTS[1:]], "max_tokens_per_doc": 2}
    by_index = {each["index"]: each["relevance_score"] for each in post(kinds, "/v1/rerank", body)["results"]}
    (expected,) = reference(QUERY, ["reset password"])
    assert by_index[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["instruction", "instruct"])
def test_instruction(kinds: Service, reference: Reference, name: str) -> None:
    """The model has no instructions, so that it is put before the query."""
    results = post(kinds, "/v1/rerank", {**BODY, name: "settings: "})["results"]
    assert_ranked(results, reference(f"settings: {QUERY}", DOCUMENTS))


INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({"query": None}, "missing_required_parameter", "query"),
    ({"query": ["x"]}, "invalid_type", "query"),
    ({"documents": None}, "missing_required_parameter", "documents"),
    ({"documents": 1}, "invalid_type", "documents"),
    ({"documents": {"text": "x"}}, "invalid_type", "documents"),
    ({"documents": []}, "invalid_input", "documents"),
    ({"documents": ["x", 1]}, "invalid_input", "documents"),
    ({"documents": ["x", None]}, "invalid_input", "documents"),
    ({"documents": [{"image": "x"}]}, "invalid_input", "documents"),
    ({"documents": ["x"] * 2049}, "array_too_long", "documents"),
    ({"documents": None, "texts": []}, "invalid_input", "texts"),
    ({"documents": ["x " * 200_000] * 2}, "max_tokens_per_request", "documents"),
    ({"documents": ["x", "x" * 1_100_000]}, "string_above_max_length", "documents"),
    ({"query": "reset " * 60, "documents": ["reset " * 40]}, "context_length_exceeded", "query"),
    ({"top_n": 0}, "invalid_value", "top_n"),
    ({"top_k": -1}, "invalid_value", "top_k"),
    ({"top_n": "3"}, "invalid_type", "top_n"),
    ({"top_n": 1.0}, "invalid_type", "top_n"),
    ({"return_documents": 1}, "invalid_type", "return_documents"),
    ({"return_documents": "yes"}, "invalid_type", "return_documents"),
    ({"raw_scores": "on"}, "invalid_type", "raw_scores"),
    ({"max_tokens_per_doc": 0}, "invalid_value", "max_tokens_per_doc"),
    ({"truncate": "START"}, "invalid_value", "truncate"),
    ({"truncate": 1}, "invalid_type", "truncate"),
    ({"truncation_direction": "Left"}, "invalid_value", "truncation_direction"),
    ({"rank_fields": ["title"]}, "invalid_value", "rank_fields"),
    ({"instruction": 1}, "invalid_type", "instruction"),
    ({"model": 1}, "invalid_type", "model"),
]


@pytest.mark.parametrize(("fields", "code", "param"), INVALID, ids=lambda value: str(value)[:40])
def test_invalid_requests(kinds: Service, fields: dict[str, Any], code: str, param: str) -> None:
    """The error names the field."""
    assert_error(kinds.http.post("/v1/rerank", json={**BODY, **fields}), 400, code, param=param)


def test_unknown_model(kinds: Service) -> None:
    response = kinds.http.post("/v1/rerank", json={**BODY, "model": "nope"})
    assert_error(response, 404, "model_not_found", param="model")


def test_a_document_that_is_not_valid_unicode_is_returned_as_it_is(kinds: Service) -> None:
    body = json.dumps({**BODY, "documents": ["\ud800"], "return_documents": True})
    response = kinds.http.post("/v1/rerank", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    assert json.loads(response.content)["results"][0]["document"] == {"text": "\ud800"}


def test_score(kinds: Service, reference: Reference) -> None:
    """As vLLM: one text with each of several, or pairs, in the order of the request."""
    scores = reference(QUERY, DOCUMENTS)
    body = post(kinds, "/v1/score", {"model": "reranker", "text_1": QUERY, "text_2": DOCUMENTS})
    assert (body["object"], body["model"]) == ("list", "reranker")
    assert [(each["index"], each["object"]) for each in body["data"]] == [(index, "score") for index in range(4)]
    np.testing.assert_allclose([each["score"] for each in body["data"]], scores, atol=1e-3)
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 20
    pairs = post(kinds, "/score", {"model": "reranker-raw", "text_1": [QUERY] * 4, "text_2": DOCUMENTS})["data"]
    logits = reference(QUERY, DOCUMENTS, raw=True)
    np.testing.assert_allclose([each["score"] for each in pairs], logits, atol=1e-3)
    single = {"text_1": QUERY, "text_2": DOCUMENTS[0], "use_activation": False}
    (only,) = post(kinds, "/v1/score", single)["data"]
    assert only["score"] == pytest.approx(logits[0], abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"text_1": None}, "missing_required_parameter", "text_1"),
        ({"text_2": []}, "invalid_input", "text_2"),
        ({"text_1": ["a", "b"]}, "invalid_input", "text_1"),
        ({"text_2": [LONG], "truncate": False}, "context_length_exceeded", "text_2"),
    ],
    ids=str,
)
def test_invalid_requests_for_scores(kinds: Service, fields: dict[str, Any], code: str, param: str) -> None:
    response = kinds.http.post("/v1/score", json={"text_1": QUERY, "text_2": DOCUMENTS, **fields})
    assert_error(response, 400, code, param=param)


def test_dashscope(kinds: Service, reference: Reference) -> None:
    """DashScope's own route has the fields in `input` and `parameters`."""
    request = {
        "model": "reranker",
        "input": {"query": QUERY, "documents": DOCUMENTS},
        "parameters": {"top_n": 3, "return_documents": True},
    }
    body = post(kinds, DASHSCOPE, request)
    assert set(body) == {"output", "usage", "request_id"}
    results = body["output"]["results"]
    order = np.argsort(-reference(QUERY, DOCUMENTS), kind="stable").tolist()
    assert [each["index"] for each in results] == order[:3]
    assert [each["document"] for each in results] == [{"text": DOCUMENTS[index]} for index in order[:3]]
    assert body["usage"]["total_tokens"] > 20


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/rerank", {"error", "error_type"}), ("/v2/rerank", {"message"}), (DASHSCOPE, {"code", "message", "request_id"})],
)
def test_errors_have_the_form_of_the_api(kinds: Service, path: str, fields: set[str]) -> None:
    response = kinds.http.post(path, json={"model": "nope", "query": QUERY, "texts": DOCUMENTS, "input": 1})
    assert response.status_code == (400 if path == DASHSCOPE else 404)
    assert set(response.json()) == fields


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_requests_are_counted_and_logged(kinds: Service, path: str) -> None:
    """As those for embeddings: each document is an input."""
    before = kinds.figure("emb_provider_inputs_total", model="reranker")
    identifier = f"counted{path.replace('/', '-')}"
    headers = {"x-request-id": identifier}
    tokens = kinds.http.post(path, json={**BODY, "model": "reranker-raw"}, headers=headers).json()["tokens"]
    wait_until(lambda: kinds.figure("emb_provider_inputs_total", model="reranker") == before + len(DOCUMENTS))
    (line,) = kinds.logged(request_id=identifier)
    assert (line["model"], line["inputs"], line["tokens"]) == ("reranker", len(DOCUMENTS), tokens["input_tokens"])


def test_the_playground_reranks(kinds: Service) -> None:
    """With the scores of `POST /v1/rerank`, and with code that sends this request. A reranker has no vectors to compare."""
    for model in ("reranker", "reranker-raw"):
        results = post(kinds, "/v1/rerank", {**BODY, "model": model})["results"]
        page = kinds.http.get("/console/playground?mode=search").text
        assert re.search(rf'<select name="reranker">.*<option>{model}</option>', page)
        assert not re.search(rf'<select name="model">[^\n]*<option>{model}</option>', page)
        form = {"mode": "search", "reranker": model, "query": QUERY, "documents": "\n".join(DOCUMENTS)}
        text = kinds.http.post("/console/playground", data=form, headers={"hx-request": "true"}).text
        rows = re.findall(r'<td class="number">(-?\d+\.\d{3})<meter.*?</td><td>(.*?)</td>', text)
        assert rows == [(f"{each['relevance_score']:.3f}", DOCUMENTS[each["index"]]) for each in results]
    curl, python, javascript = (
        html.unescape(code) for code in re.findall(r'<code id="code-[^>]*>(.*?)</code>', text, re.DOTALL)
    )
    output = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True).stdout
    assert json.loads(output)["results"] == results
    output = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, check=True).stdout
    assert [int(line.split()[0]) for line in output.splitlines()] == [each["index"] for each in results]
    assert "/v1/rerank" in javascript
    wrong = kinds.http.post(
        "/console/playground", data={"model": "reranker", "texts": "a\nb"}, headers={"hx-request": "true"}
    )
    assert (wrong.status_code, wrong.headers["hx-retarget"]) == (400, "#notice")


def test_the_model_is_described(kinds: Service) -> None:
    """With its kind, its tasks, and how close its scores are to those at fp32."""
    model = kinds.http.get("/v1/models/reranker").json()
    assert (model["kind"], model["tasks"], model["dimensions"]) == ("reranker", ["rerank"], None)
    assert model["model_type"] == "rerank"
    if model["backend"] == "openvino":
        assert model["fidelity"]["min_cosine"] is None
        assert model["fidelity"]["scores"]["max_difference"] < 1e-3
        assert model["fidelity"]["agreement"]["scores"] > 0.999
    info = kinds.http.get("/info").json()
    assert list(info["model_type"]) == ["reranker"]
