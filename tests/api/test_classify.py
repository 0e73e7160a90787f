"""The routes of classifiers: `/v1/classify` in the form of vLLM, and `/predict` in that of TEI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transformers import pipeline

from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.service import Service

    Reference = Callable[..., list[dict[str, float]]]

TEXTS = ["password", "hello world", "Open the settings and choose reset."]
PAIR = ("how do I reset it?", "Open the settings.")
LONG = "settings password reset account menu button phone email number " * 10


@pytest.fixture(scope="module")
def reference(kind_directories: dict[str, Path]) -> Reference:
    """Return a function that returns the scores of texts, or of pairs of texts, by label, with transformers."""
    classify = pipeline("text-classification", str(kind_directories["classifier"]), device="cpu", top_k=None)

    def predict(*inputs: str | tuple[str, str], raw: bool = False) -> list[dict[str, float]]:
        sent = [each if isinstance(each, str) else {"text": each[0], "text_pair": each[1]} for each in inputs]
        found = [classify(each, truncation=True, function_to_apply="none" if raw else "softmax") for each in sent]
        rows = [row[0] if isinstance(row[0], list) else row for row in found]
        return [{each["label"]: each["score"] for each in row} for row in rows]

    return predict


def post(service: Service, path: str, body: Any) -> Any:
    response = service.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_classify(kinds: Service, reference: Reference) -> None:
    """The best label of each text, and the scores in the order of the model's labels."""
    labels = kinds.http.get("/v1/models/classifier").json()["labels"]
    expected = reference(*TEXTS)
    assert len({max(row, key=lambda label: row[label]) for row in expected}) > 1, "all texts have one label"
    body = post(kinds, "/v1/classify", {"model": "classifier", "input": TEXTS})
    assert (body["object"], body["model"]) == ("list", "classifier")
    assert body["usage"]["total_tokens"] > 10
    for index, (item, row) in enumerate(zip(body["data"], expected, strict=True)):
        assert (item["index"], item["num_classes"]) == (index, 3)
        assert item["label"] == max(row, key=lambda label: row[label])
        np.testing.assert_allclose(item["probs"], [row[label] for label in labels], atol=1e-3)
    (raw,) = reference(TEXTS[0], raw=True)
    for path, fields in (("/classify", {"raw_scores": True}), ("/v1/classify", {"use_activation": False})):
        (item,) = post(kinds, path, {"model": "classifier", "input": TEXTS[0], **fields})["data"]
        np.testing.assert_allclose(item["probs"], [raw[label] for label in labels], atol=1e-3)


def predicted(row: Any) -> dict[str, float]:
    """Return the scores of a prediction of TEI by label; they must be sorted."""
    scores = [each["score"] for each in row]
    assert scores == sorted(scores, reverse=True)
    return {each["label"]: each["score"] for each in row}


@pytest.mark.parametrize(("inputs", "expected"), [(TEXTS[0], [TEXTS[0]]), (list(PAIR), [PAIR])], ids=["text", "pair"])
def test_predict_one(kinds: Service, reference: Reference, inputs: Any, expected: Any) -> None:
    """A text or a pair gets an array of its scores, the best first."""
    row = post(kinds, "/predict", {"inputs": inputs, "model": "classifier"})
    assert predicted(row) == pytest.approx(reference(*expected)[0], abs=1e-3)


def test_predict_batch(kinds: Service, reference: Reference) -> None:
    """A batch, in which texts and pairs can be mixed, gets an array for each."""
    inputs = [[TEXTS[0]], list(PAIR), [TEXTS[2]], [PAIR[1], PAIR[0]]]
    expected = reference(TEXTS[0], PAIR, TEXTS[2], (PAIR[1], PAIR[0]))
    rows = post(kinds, "/predict", {"inputs": inputs, "model": "classifier"})
    assert len(rows) == len(expected)
    for row, scores in zip(rows, expected, strict=True):
        assert predicted(row) == pytest.approx(scores, abs=1e-3)
    (logits,) = reference(TEXTS[0], raw=True)
    rows = post(kinds, "/predict", {"inputs": [[TEXTS[0]]], "model": "classifier", "raw_scores": True})
    assert predicted(rows[0]) == pytest.approx(logits, abs=1e-3)


def test_long_texts_are_cut_or_rejected(kinds: Service, reference: Reference) -> None:
    (item,) = post(kinds, "/v1/classify", {"model": "classifier", "input": LONG})["data"]
    assert max(item["probs"]) == pytest.approx(max(reference(LONG)[0].values()), abs=1e-3)
    response = kinds.http.post("/v1/classify", json={"model": "classifier", "input": ["x", LONG], "truncate": False})
    assert_error(response, 400, "context_length_exceeded", param="input", phrase="'input[1]'")
    batch = {"inputs": [["x"], ["x", LONG]], "model": "classifier", "truncate": False}
    response = kinds.http.post("/predict", json=batch)
    assert (response.status_code, response.json()["error_type"]) == (400, "Validation")


@pytest.mark.parametrize("fields", [{}, {"inputs": []}, {"inputs": ["a", "b", "c"]}, {"inputs": [["a", "b", "c"]]}, {"inputs": [[]]}, {"inputs": [["a"], "b"]}, {"inputs": 1}, {"inputs": [["a"]] * 2049}, {"inputs": "x", "raw_scores": 1}, {"inputs": "x", "truncate": "LEFT"}])  # fmt: skip
def test_invalid_requests_for_predictions(kinds: Service, fields: dict[str, Any]) -> None:
    """Errors have the form of TEI."""
    response = kinds.http.post("/predict", json={"model": "classifier", **fields})
    assert (response.status_code, set(response.json())) == (400, {"error", "error_type"})


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "missing_required_parameter", "input"),
        ({"input": []}, "invalid_input", "input"),
        ({"input": [1, 2]}, "invalid_input", "input"),
        ({"input": 1}, "invalid_type", "input"),
    ],
    ids=str,
)
def test_invalid_requests(kinds: Service, fields: dict[str, Any], code: str, param: str) -> None:
    assert_error(kinds.http.post("/v1/classify", json={"model": "classifier", **fields}), 400, code, param=param)


def test_requests_are_counted(kinds: Service) -> None:
    before = kinds.figure("emb_provider_inputs_total", model="classifier")
    post(kinds, "/v1/classify", {"model": "classifier", "input": TEXTS})
    post(kinds, "/predict", {"model": "classifier", "inputs": list(PAIR)})
    wait_until(lambda: kinds.figure("emb_provider_inputs_total", model="classifier") == before + len(TEXTS) + 1)


def test_the_model_is_described(kinds: Service) -> None:
    model = kinds.http.get("/v1/models/classifier").json()
    assert (model["kind"], model["tasks"]) == ("classifier", ["classify"])
    assert model["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert kinds.http.get("/v1/models/reranker").json()["labels"] is None
