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
    COLUMNS,
    DISTINCT,
    OUTPUTS,
    TEXTS,
    Evaluation,
    Outcome,
    Row,
    compile_here,
    exit_status,
    highest_similarity,
    layout_of,
    output_table,
    table_rows,
)
from benchmarks.family_models import FAMILIES
from emb_model_provider.backends.base import Fidelity, MultiVectorFidelity, ScoreFidelity, SparseFidelity
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


def row(expect: str, torch: Outcome, openvino: Outcome = EQUAL, kind: str = "dense") -> Row:
    return Row("small", kind, expect, "Transformer", {"torch": torch, "openvino": openvino})


@pytest.mark.parametrize("family", mark_slow_except(["bert", "prompts-excluded-left", "dense-before-pooling"]))
def test_family_equals_sentence_transformers(family: str, tmp_path: Path) -> None:
    """On both backends."""
    evaluation = Evaluation(family, FAMILIES[family], tmp_path)
    for backend in BACKENDS:
        outcome = evaluation.run(backend)
        assert (outcome.status, outcome.reason) == ("compared", "")
        assert not outcome.fails("equal")


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", mark_slow_except([name for name, family in FAMILIES.items() if family.kind != "dense"], "cross-encoder")
)
def test_family_of_another_kind_equals_its_library(family: str, tmp_path: Path) -> None:
    """On both backends, all of its outputs."""
    evaluation = Evaluation(family, FAMILIES[family], tmp_path)
    for backend in BACKENDS:
        outcome = evaluation.run(backend)
        assert (outcome.status, outcome.reason) == ("compared", "")
        assert outcome.fidelity is not None
        assert set(outcome.fidelity.agreement) == set(OUTPUTS[FAMILIES[family].kind])
        assert not outcome.fails("equal")


def test_wrong_scores_fail(tmp_path: Path) -> None:
    """They are reported with their difference; scores that are all equal prove nothing."""

    def other(_: Path, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        return np.arange(len(pairs), dtype=np.float32)[:, np.newaxis]

    wrong = Evaluation("reranker-bert", replace(FAMILIES["reranker-bert"], scores=other), tmp_path).run("torch")
    assert (wrong.status, wrong.reason) == ("compared", "")
    assert wrong.fails("equal")
    constant = replace(FAMILIES["reranker-bert"], scores=lambda _, pairs: np.ones((len(pairs), 1), dtype=np.float32))
    assert Evaluation("constant", constant, tmp_path).run("torch").status == "invalid"


@pytest.mark.parametrize(
    ("output", "figures", "equal"),
    [
        ("scores", ScoreFidelity(13, 1e-5, 1e-6, 0.99999), True),
        ("scores", ScoreFidelity(13, 0.01, 1e-6, 1.0), False),
        ("scores", ScoreFidelity(13, 1e-5, 1e-6, 0.99), False),
        ("sparse", SparseFidelity(13, 1.0, 1e-6), True),
        ("sparse", SparseFidelity(13, 0.98, 1e-6), False),
        ("sparse", SparseFidelity(13, 1.0, 0.001), False),
        ("multi_vector", MultiVectorFidelity(13, 0.99999, 1e-6), True),
        ("multi_vector", MultiVectorFidelity(13, 0.9998, 1e-6), False),
        ("multi_vector", MultiVectorFidelity(13, 1.0, 0.001), False),
    ],
)
def test_outputs_of_other_kinds_must_be_equal(output: str, figures: object, equal: bool) -> None:
    fidelity = Fidelity(min_cosine=None, mean_cosine=None, texts=13, **{output: figures})
    assert Outcome("compared", fidelity=fidelity).fails("equal") is not equal
    assert Outcome("compared").fails("equal")


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
    assert Outcome("compared", 0.99999999).cells("dense") == ["0.9999999"]
    assert Outcome("refused", reason="a | b").cells("dense") == ["refused: a \\| b"]


def test_differences_are_shown_with_two_digits() -> None:
    """Next to a correlation, which is truncated. A reason takes the place of all figures."""
    scores = ScoreFidelity(13, max_difference=0.00000318, relative_difference=1e-6, spearman=0.99999999)
    fidelity = Fidelity(min_cosine=None, mean_cosine=None, texts=13, scores=scores)
    assert Outcome("compared", fidelity=fidelity).cells("scores") == ["3.2e-06", "0.9999999"]
    assert Outcome("torch", reason="padding").cells("scores") == ["torch: padding", ""]
    table = output_table([row("equal", Outcome("compared", fidelity=fidelity), kind="reranker")], ["torch"], "scores")
    assert rows(table)[0] == ["family", "modules", *[f"{title}, torch" for title in COLUMNS["scores"].values()]]
    assert output_table([row("equal", EQUAL)], ["torch"], "scores") == ""


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
    """In the order of the program, each in the tables of its outputs."""
    document = (ROOT / "docs" / name).read_text(encoding="utf-8")
    section = document.partition("-m benchmarks.families")[2].partition("\n## ")[0]
    heads = [index for index, cells in enumerate(rows(section)) if cells[0] in ("family", "模型结构")]
    tables = [rows(section)[start:stop] for start, stop in zip(heads, [*heads[1:], None], strict=True)]
    expected = [[name for name, family in FAMILIES.items() if output in OUTPUTS[family.kind]] for output in COLUMNS]
    assert [[cells[0] for cells in table[1:]] for table in tables] == expected
    assert not any("**" in cell for table in tables for cells in table for cell in cells)


def test_texts_differ() -> None:
    """Rows of the same direction have the similarity 1, and a zero row that of no other row."""
    assert highest_similarity(np.array([[1, 0], [2, 0], [0, 0]], dtype=np.float32)) == pytest.approx(1)
    assert len({TEXTS[index] for index in DISTINCT}) == len(DISTINCT)


@pytest.mark.slow
def test_program(tmp_path: Path) -> None:
    """It prints a table, writes the results, and ends with 0 if all rows are as expected."""
    results = tmp_path / "results.json"
    command = ["--family", "bert", "--family", "gguf", "--family", "bge-m3", "--json", str(results)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.families", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    shown = [cells[0] for cells in rows(process.stdout) if cells[0] not in ("family", "---")]
    assert shown == ["bert", "gguf", "bge-m3", "bge-m3", "bge-m3"]
    assert str(tmp_path) not in process.stdout
    written = json.loads(results.read_text(encoding="utf-8"))
    assert [entry["outcomes"]["openvino"]["status"] for entry in written] == ["compared", "refused", "compared"]
