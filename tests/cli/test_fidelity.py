"""`fidelity`: a model measured at several precisions, in separate processes."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from emb_model_provider.cli.fidelity import _cells, _format_table, _notes, start_fidelity_worker
from tests.cli.helpers import run, start
from tests.service import wait_until

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.cli.conftest import Compiled

OFFLINE = {"OFFLINE": "true"}


@pytest.fixture(scope="module")
def place(compiled: Compiled) -> Path:
    """Return a directory with a small model, `model`, and a cache in which it is compiled at fp32."""
    return compiled.directory


def rows_of(table: str) -> dict[str, list[str]]:
    """Return the cells of a table's rows by the first cell, which is `precision` in the head."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return {first: rest for first, *rest in rows}


def measure(place: Path, precisions: str, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ("model", "--precisions", precisions, "--rounds", "1", "--device", "cpu", *options)
    done = run(place, "fidelity", *arguments, **OFFLINE)
    assert done.returncode == 0, done.stderr
    return done


def check_row(row: dict[str, Any], precision: str) -> None:
    assert (row["precision"], row["backend"], row["device"]) == (precision, "openvino", "cpu")
    assert row["fidelity"]["texts"] > 300
    assert 0.5 < row["fidelity"]["min_cosine"] <= row["fidelity"]["mean_cosine"] <= 1.000001
    assert row["resident_bytes"] <= row["peak_bytes"]
    for figure in ("disk_bytes", "load_s", "resident_bytes", "short_texts_per_s", "doc_texts_per_s"):
        assert row[figure] > 0, figure


# --- results ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_is_measured(place: Path) -> None:
    """Only JSON is on stdout."""
    result = json.loads(measure(place, "fp32", "--json").stdout)
    assert result["model"] == "model"
    assert set(result["about"]) == {"machine", "versions", "date"}
    assert list(result["precisions"]) == ["fp32"]
    row = result["precisions"]["fp32"]
    check_row(row, "fp32")
    assert row["fidelity"]["min_cosine"] >= 0.999
    assert (row["short_ratio"], row["doc_ratio"]) == (1, 1)


@pytest.mark.slow
def test_a_model_is_measured_at_each_precision(place: Path) -> None:
    """It is compiled if necessary. The next measurement uses the same compiled form."""
    rows = json.loads(measure(place, "fp32,int8", "--json").stdout)["precisions"]
    assert list(rows) == ["fp32", "int8"]
    for precision, row in rows.items():
        check_row(row, precision)
    assert rows["int8"]["fidelity"]["min_cosine"] < rows["fp32"]["fidelity"]["min_cosine"]
    assert rows["int8"]["disk_bytes"] < rows["fp32"]["disk_bytes"]

    done = measure(place, "int8")
    assert "compiling" not in done.stderr
    table = rows_of(done.stdout)
    assert {"precision", "int8"} <= set(table)
    assert {len(cells) for cells in table.values()} == {13}
    assert table["int8"][0].endswith(" (openvino)")
    assert float(table["int8"][1]) == pytest.approx(rows["int8"]["fidelity"]["min_cosine"], abs=1e-3)
    assert "versions: Python" in done.stdout


@pytest.mark.slow
def test_a_precision_that_is_not_possible_has_its_reason_in_its_row(place: Path) -> None:
    """The exit code is 1 if no precision is possible."""
    options = ("--backend", "openvino", "--device", "cuda", "--precisions", "fp32,int8", "--rounds", "1")
    done = run(place, "fidelity", "model", *options, **OFFLINE)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    rows = rows_of(done.stdout)
    for precision in ("fp32", "int8"):
        assert rows[precision][0].startswith("not possible: The backend openvino serves on the CPU")


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_directory_that_does_not_exist_is_one_line(options: tuple[str, ...], tmp_path: Path) -> None:
    """The exit code is 2, and there is no table, but with --json the error as an object."""
    missing = str(tmp_path / "nowhere" / "model")
    done = run(tmp_path, "fidelity", missing, "--precisions", "fp32,int8", "--rounds", "1", *options)
    assert done.returncode == 2
    codes = [json.loads(done.stdout)["error"]["code"]] if done.stdout else []
    assert codes == (["repository_not_found"] if options else [])
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert f"The model directory {missing} does not exist" in line


def test_a_precision_that_was_not_measured_has_no_figures() -> None:
    """Except fp32 in torch, which is the reference."""
    row = {"computed": "fp32", "backend": "torch", "fidelity": None, "disk_bytes": 1, "resident_bytes": 1}
    row |= {"peak_bytes": 1, "load_s": 1, "short_texts_per_s": 1, "short_ratio": 1}
    row |= {"doc_texts_per_s": 1, "doc_ratio": 1}
    assert _cells("fp32", {**row, "precision": "fp32"})[2:6] == ("1.00000",) * 4
    assert _cells("int8", {**row, "precision": "int8"})[2:6] == ("-",) * 4


def test_other_outputs_have_a_column_for_their_agreement() -> None:
    """Such as the scores of a reranker, which has no cosine. The reference itself agrees fully."""
    row = dict.fromkeys(("disk_bytes", "resident_bytes", "peak_bytes", "load_s"), 1)
    row |= dict.fromkeys(("short_texts_per_s", "short_ratio", "doc_texts_per_s", "doc_ratio"), 1)
    none = dict.fromkeys(("min_cosine", "mean_cosine", "top10_overlap", "spearman"))
    made = {"computed": "bf16", "backend": "torch", "fidelity": none, "agreement": {"scores": 0.985}}
    reference = {"computed": "fp32", "backend": "torch", "fidelity": None, "agreement": {}}
    table = rows_of(
        _format_table({"fp32": {**row, **reference, "precision": "fp32"}, "bf16": {**row, **made, "precision": "bf16"}})
    )
    column = table["precision"].index("agreement of scores")
    assert (table["fp32"][column], table["bf16"][column]) == ("1.00000", "0.98500")
    assert table["bf16"][1:5] == ["-"] * 4
    assert {len(cells) for cells in table.values()} == {len(table["precision"])}


def test_a_precision_below_its_floor_has_a_note() -> None:
    """The service would not serve it."""
    row = {"agreement": {"dense": 0.89, "sparse": 0.8}, "floor": 0.9, "agreement_floor": 0.8, "notes": ["a note"]}
    assert _notes(row) == ["a note", "not served: below its floor of 0.9 (EMB_PROVIDER_FIDELITY_FLOORS)"]
    assert _notes({**row, "floor": 0.89}) == ["a note"]
    row |= {"floor": 0.89, "agreement_floor": 0.9}
    assert _notes(row) == ["a note", "not served: below its floor of 0.9 (EMB_PROVIDER_AGREEMENT_FLOORS)"]
    assert _notes({"error": "not possible"}) == []


# --- processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "reason"),
    [("import os; os.kill(os.getpid(), 9)", "lack of memory"), ("raise SystemExit(3)", "ended with status 3")],
)
def test_a_worker_that_dies_has_an_error(program: str, reason: str) -> None:
    """The other precisions are still measured."""
    with start_fidelity_worker({"model": "x"}, command=(sys.executable, "-c", program)) as worker:
        assert reason in worker.loaded["error"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before a worker", "while a worker starts", "while a worker measures"])
def test_an_interrupt_ends_all_processes(place: Path, moment: str) -> None:
    """Ctrl-C reaches the whole process group. The exit code is 130, and there is no traceback."""
    process = start(
        place,
        "fidelity", "model", "--precisions", "fp32", "--rounds", "100", "--device", "cpu",
        new_session=True,
        **OFFLINE,
    )  # fmt: skip
    assert process.stderr is not None
    line = "throughput: round 1 of 100" if moment == "while a worker measures" else "fp32: preparing"
    assert any(line in shown for shown in process.stderr)  # reads until the line is printed
    if moment == "while a worker starts":
        wait_until(lambda: psutil.Process(process.pid).children())
    os.killpg(process.pid, signal.SIGINT)
    # The workers share stderr, so that this returns when the last of them has ended.
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.rstrip().endswith("interrupted")
    assert "Traceback" not in stderr
