"""`rerank`: documents from arguments, files and pipes, in the order of their scores."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from sentence_transformers import CrossEncoder

from tests.cli.helpers import invoke, run
from tests.hubs.conftest import HF_REPO
from tests.kind_checks import QUERY
from tests.kind_models import RERANKERS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hubs.servers import HuggingFaceServer

DOCUMENTS = ["Open the settings and choose reset.", "The quick brown fox", "今天天气很好", "reset"]


@pytest.mark.slow
def test_documents_are_ranked_like_by_a_cross_encoder(tmp_path: Path) -> None:
    """From stdin, a file and an argument. Scores have the activation of the model, with --raw they are logits."""
    directory = RERANKERS["bert"](tmp_path / "model")
    model = CrossEncoder(str(directory), device="cpu", local_files_only=True)
    (tmp_path / "more.txt").write_text(f"{DOCUMENTS[2]}\n", encoding="utf-8")
    command = ("rerank", QUERY, "-", "@more.txt", DOCUMENTS[3], "-m", str(directory))
    stdin, settings = "\n".join(DOCUMENTS[:2]), {"BACKEND": "torch", "DEVICE": "cpu"}

    done = run(tmp_path, *command, stdin=stdin, **settings)
    assert done.returncode == 0, done.stderr
    expected = model.predict([(QUERY, text) for text in DOCUMENTS], show_progress_bar=False)
    order = sorted(range(4), key=lambda index: -expected[index])
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [document for _, document in lines] == [DOCUMENTS[index] for index in order]
    assert [float(score) for score, _ in lines] == pytest.approx([expected[index] for index in order], abs=1e-3)

    logits = model.predict(
        [(QUERY, text) for text in DOCUMENTS], activation_fn=torch.nn.Identity(), show_progress_bar=False
    )
    done = run(tmp_path, *command, "--raw", "--json", "--top-n", "2", stdin=stdin, **settings)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["index"] for each in found] == order[:2]
    assert [each["document"] for each in found] == [DOCUMENTS[index] for index in order[:2]]
    assert [each["score"] for each in found] == pytest.approx([logits[index] for index in order[:2]], abs=1e-3)


def test_an_embedding_model_is_no_reranker(tmp_path: Path, service_cache: str) -> None:
    """The error says what the bundled model can do."""
    done = run(tmp_path, "rerank", QUERY, "a document", CACHE_DIR=service_cache)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "does not support 'rerank'" in done.stderr
    assert "['embed']" in done.stderr


def test_rerank_without_a_document_does_not_load_a_model(here: Path, huggingface: HuggingFaceServer) -> None:
    """Stdin is empty."""
    result = invoke("rerank", QUERY, "-", "--model", HF_REPO, stdin="")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "There is no document to rerank.\n")
    assert not huggingface.requests
