"""The example of the ModelScope guide, with the real client and the real service."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.hubs.servers import ModelScopeServer
from tests.models import gte_configuration, reference_bert, save_modelscope
from tests.service import Service

if TYPE_CHECKING:
    from pathlib import Path

GTE = "damo/nlp_gte_sentence-embedding_chinese-base"
TEXTS = ["这是一个中文文本示例", "hello world", "一"]


@pytest.mark.slow
def test_gte_from_modelscope(tmp_path: Path, backend: str) -> None:
    """The settings of the guide serve a GTE repository with the vectors of its CLS token, and a second start sends no request to the hub."""
    directory = save_modelscope(tmp_path / "gte", gte_configuration())
    files = {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    settings = {
        "MODEL_SOURCE": "modelscope",
        "MODEL_NAME": GTE,
        "MODEL_PRECISION": "fp32",
        "MODELSCOPE_CACHE_DIR": str(tmp_path / "modelscope"),
        "CACHE_DIR": str(tmp_path / "own"),
        "BACKEND": backend,
    }
    with ModelScopeServer(repos={GTE: files}) as hub:
        settings["MODELSCOPE_ENDPOINT"] = hub.url
        with Service(tmp_path / "first", **settings) as service:
            service.wait()
            answer = service.embed(*TEXTS, model=GTE).json()
            (model,) = service.http.get("/v1/models").json()["data"]
        assert hub.requests
        hub.forget()
        with Service(tmp_path / "second", OFFLINE="true", **settings) as service:
            assert service.wait().embed(*TEXTS, model=GTE).json()["data"] == answer["data"]
        assert hub.requests == []

    assert (model["id"], model["source"], model["owned_by"]) == (GTE, "modelscope", "damo")
    assert (model["pooling"], model["normalize"]) == ("cls", False)
    vectors = np.array([entry["embedding"] for entry in answer["data"]])
    cls, mean = _reference(directory)
    np.testing.assert_allclose(vectors, cls, atol=1e-4)
    assert not np.allclose(vectors, mean, atol=1e-1)


def _reference(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the CLS and the mean vectors that transformers alone computes from a directory's files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = reference_bert(directory)
    cls, mean = [], []
    with torch.no_grad():
        for text in TEXTS:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            cls.append(hidden[0].numpy())
            mean.append(hidden.mean(0).numpy())
    return np.array(cls), np.array(mean)
