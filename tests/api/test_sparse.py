"""Sparse vectors, vectors of tokens and similarities: `POST /v1/embeddings` and TEI's routes."""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from sentence_transformers import MultiVectorEncoder, SparseEncoder

from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.service import Service

TEXTS = ["Open the settings and choose reset.", "The quick brown fox", "今天天气很好"]
QUERY = "how do I reset it?"


def post(service: Service, path: str, body: Any) -> Any:
    response = service.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def embed(service: Service, model: str, *types: str, **fields: Any) -> Any:
    return post(service, "/v1/embeddings", {"model": model, "input": TEXTS, "embedding_types": list(types), **fields})[
        "data"
    ]


def densify(vectors: Any, width: int) -> NDArray[np.float32]:
    dense = np.zeros((len(vectors), width), dtype=np.float32)
    for row, vector in enumerate(vectors):
        dense[row, vector["indices"]] = vector["values"]
    return dense


@pytest.fixture(scope="module")
def splade(kind_directories: dict[str, Path]) -> SparseEncoder:
    return SparseEncoder(str(kind_directories["splade"]), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def colbert(kind_directories: dict[str, Path]) -> MultiVectorEncoder:
    return MultiVectorEncoder(str(kind_directories["colbert"]), device="cpu", local_files_only=True)


def test_sparse(kinds: Service, splade: SparseEncoder) -> None:
    """The vectors of the reference, or their largest weights only."""
    expected = splade.encode(TEXTS, convert_to_sparse_tensor=False, show_progress_bar=False).numpy()
    items = embed(kinds, "splade", "sparse")
    assert [list(item) for item in items] == [["object", "index", "embedding", "sparse"]] * len(TEXTS)
    assert [item["embedding"] for item in items] == [[]] * len(TEXTS)
    np.testing.assert_allclose(densify([item["sparse"] for item in items], expected.shape[1]), expected, atol=1e-3)
    for item in items:
        assert item["sparse"]["indices"] == sorted(item["sparse"]["indices"])
    for item, row in zip(embed(kinds, "splade", "sparse", top_k=3), expected, strict=True):
        np.testing.assert_allclose(sorted(item["sparse"]["values"]), np.sort(row)[-3:], atol=1e-3)


def test_sparse_of_tei(kinds: Service, splade: SparseEncoder) -> None:
    """An array of weights for each text, also for one."""
    expected = splade.encode(TEXTS, convert_to_sparse_tensor=False, show_progress_bar=False).numpy()
    rows = post(kinds, "/embed_sparse", {"inputs": TEXTS, "model": "splade", "truncate": True})
    vectors = [{"indices": [each["index"] for each in row], "values": [each["value"] for each in row]} for row in rows]
    np.testing.assert_allclose(densify(vectors, expected.shape[1]), expected, atol=1e-3)
    assert post(kinds, "/embed_sparse", {"inputs": TEXTS[0], "model": "splade"}) == rows[:1]


@pytest.mark.parametrize("input_type", ["query", "document"])
def test_multi_vector(kinds: Service, colbert: MultiVectorEncoder, input_type: str) -> None:
    """The vectors of the tokens as numbers, or as base64 with their shape."""
    encode = colbert.encode_query if input_type == "query" else colbert.encode_document
    expected = encode(TEXTS, convert_to_numpy=True, show_progress_bar=False)
    items = embed(kinds, "colbert", "multi_vector", input_type=input_type)
    encoded = embed(kinds, "colbert", "multi_vector", input_type=input_type, encoding_format="base64")
    for vectors, item, packed in zip(expected, items, encoded, strict=True):
        assert list(item) == ["object", "index", "embedding", "multi_vector"]
        np.testing.assert_allclose(item["multi_vector"], vectors, atol=1e-3)
        assert packed["shape"] == list(vectors.shape)
        decoded = np.frombuffer(b64decode(packed["multi_vector"]), dtype="<f4").reshape(packed["shape"])
        np.testing.assert_allclose(decoded, vectors, atol=1e-3)
    by_tei = post(kinds, "/embed_all", {"inputs": TEXTS, "model": "colbert", "prompt_name": input_type})
    for vectors, rows in zip(expected, by_tei, strict=True):
        np.testing.assert_allclose(rows, vectors, atol=1e-3)


def test_several_outputs_of_one_request(kinds: Service) -> None:
    """They are those of separate requests. The dense vector has the requested type."""
    items = embed(kinds, "m3", "dense", "sparse", "multi_vector")
    assert list(items[0]) == ["object", "index", "embedding", "sparse", "multi_vector"]
    dense, sparse, vectors = (embed(kinds, "m3", name) for name in ("dense", "sparse", "multi_vector"))
    for index, item in enumerate(items):
        np.testing.assert_allclose(item["embedding"], dense[index]["embedding"], atol=1e-3)
        assert item["sparse"]["indices"] == sparse[index]["sparse"]["indices"]
        np.testing.assert_allclose(item["sparse"]["values"], sparse[index]["sparse"]["values"], atol=1e-3)
        np.testing.assert_allclose(item["multi_vector"], vectors[index]["multi_vector"], atol=1e-3)
    names = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
    assert list(post(kinds, "/v1/embeddings", {"model": "m3", "input": "x", **names})["data"][0]) == list(items[0])
    bits = embed(kinds, "m3", "ubinary", "sparse")
    assert [len(item["embedding"]) for item in bits] == [48 // 8] * len(TEXTS)
    assert [item["sparse"]["indices"] for item in bits] == [item["sparse"]["indices"] for item in items]


def test_openai_sdk(kinds: Service) -> None:
    """The SDK requests base64, and keeps fields that it does not know."""
    with openai.OpenAI(base_url=f"{kinds.url}/v1", api_key="none") as client:
        response = client.embeddings.create(
            model="splade", input=TEXTS, extra_body={"embedding_types": ["sparse"], "top_k": 2}
        )
    assert [item.embedding for item in response.data] == [[]] * len(TEXTS)
    assert [len(item.model_extra["sparse"]["indices"]) for item in response.data if item.model_extra] == [2] * 3


def test_similarity(kinds: Service, splade: SparseEncoder, colbert: MultiVectorEncoder) -> None:
    """The cosine of dense vectors, else MaxSim or the dot product, of a query and documents."""
    inputs = {"source_sentence": QUERY, "sentences": TEXTS}
    items = post(kinds, "/v1/embeddings", {"model": "m3", "input": [QUERY, *TEXTS]})["data"]
    vectors = np.array([item["embedding"] for item in items], dtype=np.float32)
    dense: dict[str, Any] = {"convert_to_sparse_tensor": False, "show_progress_bar": False}
    query = splade.encode_query([QUERY], **dense).numpy()
    colbert_query = colbert.encode_query([QUERY], show_progress_bar=False)
    expected = {
        "m3": vectors[1:] @ vectors[0],
        "splade": splade.encode_document(TEXTS, **dense).numpy() @ query[0],
        "colbert": colbert.similarity(colbert_query, colbert.encode_document(TEXTS, show_progress_bar=False))[0],
    }
    for model, values in expected.items():
        for path in ("/similarity", "/v1/similarity", "/"):
            actual = post(kinds, path, {"inputs": inputs, "model": model})
            np.testing.assert_allclose(actual, np.asarray(values), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"embedding_types": ["sparse", "float", "int8"]}, "invalid_value", "embedding_types"),
        ({"embedding_types": ["colbert"]}, "invalid_value", "embedding_types"),
        ({"top_k": 0}, "invalid_value", "top_k"),
        ({"top_k": "3"}, "invalid_type", "top_k"),
        ({"return_dense": False}, "invalid_value", "return_dense"),
        ({"return_sparse": 1}, "invalid_type", "return_sparse"),
        ({"return_multivector": True}, "invalid_value", "return_multivector"),
    ],
    ids=str,
)
def test_invalid_requests(kinds: Service, fields: dict[str, Any], code: str, param: str) -> None:
    response = kinds.http.post("/v1/embeddings", json={"model": "m3", "input": "x", **fields})
    assert_error(response, 400, code, param=param)


PAIR_INPUTS = {"inputs": {"source_sentence": "x", "sentences": ["y"]}}
UNSUPPORTED: list[tuple[str, dict[str, Any], str, set[str]]] = [
    ("/v1/embeddings", {"input": "x"}, "reranker", {"error"}),
    ("/v1/embeddings", {"input": "x"}, "splade", {"error"}),
    ("/v1/embeddings", {"input": "x", "embedding_types": ["dense", "multi_vector"]}, "splade", {"error"}),
    ("/openai/deployments/classifier/embeddings", {"input": "x"}, "classifier", {"error"}),
    ("/v1/rerank", {"query": "x", "documents": ["y"]}, "m3", {"error"}),
    ("/v1/score", {"text_1": "x", "text_2": "y"}, "classifier", {"error"}),
    ("/v1/classify", {"input": "x"}, "reranker", {"error"}),
    ("/v1/similarity", PAIR_INPUTS, "reranker", {"error"}),
    ("/embedding", {"content": "x"}, "colbert", {"error"}),
    ("/rerank", {"query": "x", "texts": ["y"]}, "colbert", {"error", "error_type"}),
    ("/predict", {"inputs": "x"}, "reranker", {"error", "error_type"}),
    ("/embed", {"inputs": "x"}, "reranker", {"error", "error_type"}),
    ("/embed_sparse", {"inputs": "x"}, "colbert", {"error", "error_type"}),
    ("/embed_all", {"inputs": "x"}, "splade", {"error", "error_type"}),
    ("/similarity", PAIR_INPUTS, "classifier", {"error", "error_type"}),
    ("/v1/embed", {"texts": ["x"]}, "reranker", {"message"}),
    ("/v2/embed", {"texts": ["x"]}, "reranker", {"message"}),
    ("/v2/rerank", {"query": "x", "documents": ["y"]}, "splade", {"message"}),
    ("/api/embed", {"input": "x"}, "reranker", {"error"}),
    ("/api/embeddings", {"prompt": "x"}, "classifier", {"error"}),
    (
        "/api/v1/services/rerank/text-rerank/text-rerank",
        {"input": {"query": "x", "documents": ["y"]}},
        "m3",
        {"code", "message", "request_id"},
    ),
]


def _id(value: object) -> str:
    """Return the same id in all processes, in which a set has another order."""
    return "-".join(sorted(value)) if isinstance(value, set) else str(value)[:30]


@pytest.mark.parametrize(("path", "body", "model", "fields"), UNSUPPORTED, ids=_id)
def test_a_model_is_only_asked_for_what_it_can_do(
    kinds: Service, path: str, body: dict[str, Any], model: str, fields: set[str]
) -> None:
    """The error has the form of the API, and names the kind of the model and its tasks."""
    headers = {"x-request-id": f"unsupported-{UNSUPPORTED.index((path, body, model, fields))}"}
    response = kinds.http.post(path, json={"model": model, **body}, headers=headers)
    assert (response.status_code, set(response.json())) == (400, fields)
    kind = kinds.http.get(f"/v1/models/{model}").json()["kind"]
    message = json_message(response.json())
    assert f"The model `{model}` does not support" in message
    assert f"its kind is '{kind}'" in message
    if model in ("splade", "colbert") and "does not support 'embed'" in message:
        output = "sparse" if model == "splade" else "multi_vector"
        assert f"Set 'embedding_types' of POST /v1/embeddings to ['{output}'], or choose another model" in message
    if isinstance(response.json().get("error"), dict):
        assert_error(response, 400, "unsupported_task", param="model")


def json_message(body: dict[str, Any]) -> str:
    """Return the message of an error of any API."""
    error = body.get("error", body)
    return str(error["message"] if isinstance(error, dict) else error)


def test_requests_are_counted(kinds: Service) -> None:
    before = {name: kinds.figure("emb_provider_inputs_total", model=name) for name in ("splade", "colbert")}
    post(kinds, "/embed_sparse", {"inputs": TEXTS, "model": "splade"})
    post(kinds, "/embed_all", {"inputs": TEXTS, "model": "colbert"})
    post(kinds, "/v1/similarity", {"inputs": {"source_sentence": QUERY, "sentences": TEXTS}, "model": "colbert"})
    for name, count in (("splade", 3), ("colbert", 7)):
        wait_until(
            lambda name=name, count=count: kinds.figure("emb_provider_inputs_total", model=name) == before[name] + count
        )


def test_the_models_are_described(kinds: Service) -> None:
    models = {model["id"]: model for model in kinds.http.get("/v1/models").json()["data"]}
    assert models["splade"]["tasks"] == ["embed_sparse"]
    assert models["colbert"]["tasks"] == ["embed_multi_vector"]
    assert models["m3"]["tasks"] == ["embed", "embed_sparse", "embed_multi_vector"]
    assert {name: model["model_type"] for name, model in models.items() if name.startswith("rerank")} == {
        "reranker": "rerank", "reranker-raw": "rerank", "reranker-cut": "rerank",
    }  # fmt: skip
