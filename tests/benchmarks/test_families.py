"""The comparison of families with sentence-transformers, and its table."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import ROOT
from benchmarks.families import (
    BACKENDS,
    DISTINCT,
    TEXTS,
    Evaluation,
    Outcome,
    Row,
    compile_here,
    exit_status,
    highest_similarity,
    layout_of,
    table_rows,
)
from benchmarks.family_models import FAMILIES
from tests.docs.markdown import rows
from tests.marks import mark_slow_except

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

EQUAL = Outcome("compared", 0.99999)


@pytest.fixture(autouse=True)
def compile_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emb_model_provider.artifacts.prepare.run_compiler", compile_here)


def row(expect: str, torch: Outcome, openvino: Outcome = EQUAL) -> Row:
    return Row("small", expect, "Transformer", {"torch": torch, "openvino": openvino})


@pytest.mark.parametrize("family", mark_slow_except(["bert", "prompts-excluded-left", "dense-before-pooling"]))
def test_family_equals_sentence_transformers(family: str, tmp_path: Path) -> None:
    """On both backends."""
    evaluation = Evaluation(family, FAMILIES[family], tmp_path)
    for backend in BACKENDS:
        outcome = evaluation.run(backend)
        assert (outcome.status, outcome.reason) == ("compared", "")
        assert not outcome.fails("equal")


def test_wrong_vectors_fail(tmp_path: Path) -> None:
    """The cosine of a reference with other vectors is reported, with the text."""

    def other(_: Path, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.random.default_rng(1).normal(size=(len(texts), 48)).astype(np.float32)

    outcome = Evaluation("bert", replace(FAMILIES["bert"], reference=other), tmp_path).run("torch")
    assert outcome.status == "compared"
    assert outcome.fails("equal")
    assert "in a batch: " in outcome.reason


def test_similar_reference_vectors_are_invalid(tmp_path: Path) -> None:
    """If all texts have the same vector, the comparison proves nothing."""
    constant = replace(FAMILIES["bert"], reference=lambda _, texts: np.ones((len(texts), 48), dtype=np.float32))
    outcome = Evaluation("bert", constant, tmp_path).run("torch")
    assert outcome.status == "invalid"
    assert outcome.fails("equal")


def test_a_served_model_that_should_be_refused_fails(tmp_path: Path) -> None:
    """Its vectors are not compared."""
    outcome = Evaluation("bert", replace(FAMILIES["bert"], expect="refused"), tmp_path).run("torch")
    assert outcome.fails("refused")
    assert outcome.reason == "served, not refused"


@pytest.mark.parametrize(
    ("expect", "outcome", "fails"),
    [
        ("equal", EQUAL, False),
        ("equal", Outcome("compared", 0.9998), True),
        ("equal", Outcome("compared", float("nan")), True),
        ("equal", Outcome("compared", 1.0, "other norms"), True),
        ("equal", Outcome("torch", reason="it cannot be exported"), False),
        ("equal", Outcome("refused", reason="it needs code"), True),
        ("equal", Outcome("error", reason="KeyError"), True),
        ("refused", Outcome("refused", reason="it is a reranker"), False),
        ("refused", EQUAL, True),
        ("refused", Outcome("torch", reason="it cannot be exported"), True),
        ("refused", Outcome("error", reason="KeyError"), True),
    ],
)
def test_the_exit_status_is_1_if_a_row_fails(expect: str, outcome: Outcome, fails: bool) -> None:
    """A failed cell is bold."""
    good = row("equal", EQUAL)
    bad = row(expect, outcome, EQUAL if expect == "equal" else Outcome("refused", reason="it is a reranker"))
    assert exit_status([good, bad]) == int(fails)
    *_, torch, openvino = next(table_rows([bad], BACKENDS))
    assert torch.startswith("**") == fails
    assert not openvino.startswith("**")


def test_cosines_are_truncated() -> None:
    """0.99999999 is not shown as 1."""
    assert Outcome("compared", 0.99999999).cell == "0.9999999"
    assert Outcome("refused", reason="a | b").cell == "refused: a \\| b"


def test_layouts_show_modules_and_pooling(tmp_path: Path) -> None:
    """Of modules.json, or the name of the configuration file."""
    FAMILIES["pooling-cls+mean"].build(tmp_path / "modules")
    FAMILIES["bare-bert"].build(tmp_path / "bare")
    assert layout_of(tmp_path / "modules") == "Transformer, Pooling (cls+mean), Normalize"
    assert layout_of(tmp_path / "bare") == "config.json only"


def test_a_refusal_of_both_backends_is_shown_once() -> None:
    """Its message is the same."""
    refused = Outcome("refused", reason="it is a reranker")
    assert list(table_rows([row("refused", refused, refused)], BACKENDS)) == [
        ["small", "Transformer", "refused: it is a reranker", "refused"]
    ]


@pytest.mark.parametrize("name", ["models.md", "models.zh-CN.md"])
def test_documents_contain_all_families(name: str) -> None:
    """In the order of the program."""
    document = (ROOT / "docs" / name).read_text(encoding="utf-8")
    table = document.partition("-m benchmarks.families")[2].partition("\n## ")[0]
    assert [cells[0] for cells in rows(table)[1:]] == list(FAMILIES)


def test_texts_differ() -> None:
    """Rows of the same direction have the similarity 1, and a zero row that of no other row."""
    assert highest_similarity(np.array([[1, 0], [2, 0], [0, 0]], dtype=np.float32)) == pytest.approx(1)
    assert len({TEXTS[index] for index in DISTINCT}) == len(DISTINCT)


@pytest.mark.slow
def test_program(tmp_path: Path) -> None:
    """It prints a table, writes the results, and ends with 0 if all rows are as expected."""
    results = tmp_path / "results.json"
    command = ["--family", "bert", "--family", "cross-encoder", "--json", str(results)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.families", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert [cells[0] for cells in rows(process.stdout)[2:]] == ["bert", "cross-encoder"]
    assert str(tmp_path) not in process.stdout
    written = json.loads(results.read_text(encoding="utf-8"))
    assert [entry["outcomes"]["openvino"]["status"] for entry in written] == ["compared", "refused"]
