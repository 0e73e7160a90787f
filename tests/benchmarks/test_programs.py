"""Each benchmark runs with `--quick` from its command line to its tables. No time is asserted."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from benchmarks import ROOT
from benchmarks.engine import BATCHES
from benchmarks.workloads import OPEN_LOOPS, WORKLOADS

pytestmark = pytest.mark.slow


def test_serve() -> None:
    """Each workload has a rate for the contender, no request fails, and all vectors are correct."""
    output = _run("serve", "--contenders", "ours")
    (rates,) = _table(output, "Requests answered per second")
    assert (rates[0], len(rates)) == ("ours", len(WORKLOADS) + 2)
    assert all(map(_is_positive, rates[1:]))
    closed = _table(output, "Latency in closed loops")
    opened = _table(output, "Latency at 70% of each contender's own throughput")
    assert (len(closed), len(opened)) == (len(WORKLOADS), len(OPEN_LOOPS))
    assert {row[6] for row in closed} | {row[8] for row in opened} == {"0"}
    (vectors,) = _table(output, "Correctness")
    assert (vectors[0], vectors[2]) == ("ours", "384")
    assert float(vectors[3]) > 0.995


def test_engine() -> None:
    """Each batch has a rate for each contender, and its share of the machine's matrix products."""
    output = _run("engine", "--contenders", "ours,engine")
    for title in ("Texts per second", "Share of the limit"):
        rows = _table(output, title)
        assert len(rows) == len(BATCHES[::3])
        assert all(len(row) == 3 and all(map(_is_positive, row[1:])) for row in rows)


def test_start() -> None:
    """Each start has a time to the first vector and its memory, and all requests of the load succeed."""
    rows = _table(_run("start", "--contenders", "ours"), "Startup time and memory")
    assert [row[0] for row in rows] == ["ours, first start", "ours"]
    assert all(_is_positive(cell) for row in rows for cell in row[1:5])
    assert {row[5] for row in rows} == {"0"}


def test_fairness() -> None:
    """Single texts have latencies without and with large requests, and no request fails."""
    rows = _table(_run("fairness", "--large", "short-float"), "Latency of single short texts")
    assert [row[0] for row in rows] == ["none", "64 short texts, float"]
    assert all(map(_is_positive, [*rows[0][3:6], *rows[1][1:7]]))
    assert {row[-1] for row in rows} == {"0"}


def test_batches() -> None:
    """Each kind of batch has a rate, and single requests beside it have a latency."""
    output = _run("batches")
    rates = _table(output, "Texts per second")
    assert len(rates) == 3
    assert all(len(row) == 8 and all(map(_is_positive, row[1:7])) for row in rates)
    latencies = _table(output, "Latency of single requests")
    assert [row[0] for row in latencies] == ["no batch", "batch of short texts", "batch of documents"]
    assert {row[4] for row in latencies} == {"0"}


def test_stress() -> None:
    """Models are loaded, unloaded, added and removed during requests, and each response is the expected one."""
    output = _run("stress")
    counts = {row[0]: row[1] for row in _table(output, "Result")}
    assert (counts["**wrong vectors**"], counts["**unexpected responses**"]) == ("0", "0")
    assert int(counts["requests for embeddings"].replace(",", "")) > 0
    assert int(counts["operations"].replace(",", "")) > 0


def test_hostile() -> None:
    """Each hostile body is refused, from one client and from several, and has its ratios to a valid body of the same size."""
    rows = _table(_run("hostile"), "Memory and event loop")
    assert [(row[0], row[1]) for row in rows[::9]] == [
        ("one short text", "1"),
        ("a long instruction", "1"),
        ("a long keyword", "8"),
    ]
    for row in rows:
        assert _is_positive(row[4])
        is_valid = row[0] in ("one short text", "a valid body of this size")
        assert re.fullmatch(r"\d+ 200" if is_valid else r"(\d+ (400|413|429)(, )?)+", row[6])
        assert is_valid or _is_positive(row[5])


def test_workers() -> None:
    """Each number of workers has the time of a request, and no request fails."""
    rows = [line.strip("| ").split(" | ") for line in _run("workers").splitlines() if line.startswith("|")][2:]
    assert [row[:2] for row in rows] == [["16", "1"], ["16", "2"], ["64", "1"], ["64", "2"]]
    assert all(_is_positive(cell) for row in rows for cell in row[2:8])
    assert {row[8] for row in rows} == {"0"}


def test_restart() -> None:
    """The service responds again after a crash, and no request that is sent after the crash fails."""
    (row,) = _table(_run("restart"), "After a crash")
    assert row[0] == "supervisor"
    assert all(map(_is_positive, row[1:4]))
    assert row[6] == "0 failed"


def test_memory() -> None:
    """All shapes are run, and memory is read before them and after each step."""
    rows = _table(_run("memory"), "Resident memory by number of shapes")
    assert [row[0] for row in rows] == ["loaded", *map(str, range(10, 121, 10))]
    assert all(_is_positive(cell) for row in rows for cell in row[1:])
    peaks = [float(row[2]) for row in rows]
    assert peaks == sorted(peaks)
    assert all(float(row[1]) <= peak for row, peak in zip(rows, peaks, strict=True))


def test_console() -> None:
    """Each number of viewers has a rate and its ratio, and each viewer receives an event a second."""
    rows = _table(_run("console"), "Cost of the console")
    assert [row[0] for row in rows] == ["none", "1", "5"]
    assert all(_is_positive(row[1]) for row in rows)
    assert all(0.3 < float(row[3]) < 2 for row in rows[1:])


def test_reuse() -> None:
    """Each case has the time with and without the cache, and repeated texts are faster."""
    rows = _table(_run("reuse"), "Cost of the result cache")
    assert [row[0] for row in rows] == ["1 short text", "64 short texts", "1 document", "32 documents"]
    assert all(float(row[5].replace(",", "")) < float(row[1].replace(",", "")) for row in rows)


def test_bulk() -> None:
    """The command has a rate for each format, memory for each size, and the same files after kills."""
    output = _run("bulk")
    rates = _table(output, "Rate")
    assert [row[0] for row in rates] == ["engine", "command, parquet", "command, npy", "command, jsonl"]
    assert all(_is_positive(row[1]) and _is_positive(row[2]) for row in rates)
    memory = _table(output, "Memory")
    assert [row[0] for row in memory] == ["200", "2,000", "20,000"]
    assert all(_is_positive(row[5]) and float(row[5]) < 500 for row in memory)
    (killed,) = _table(output, "Kills")
    assert (int(killed[0]) > 0, killed[1:]) == (True, ["20,000", "0", "0", "0"])


def test_rerank() -> None:
    """Each case has a rate for each contender, logits that are equal at fp32, and the time that HTTP adds."""
    output = _run("rerank", "--contenders", "st-fp32,ours-fp32")
    rates = _table(output, "Pairs per second")
    assert [row[0] for row in rates] == ["10 short texts", "100 short texts"]
    assert all(map(_is_positive, [cell for row in rates for cell in row[1:]]))
    compared = _table(output, "Ratios")
    assert all(_is_positive(row[1]) and float(row[2]) < 1e-3 for row in compared)
    added = _table(output, "What HTTP adds")
    assert all(_is_positive(row[1]) and _is_positive(row[2]) and _is_positive(row[4]) for row in added)


def test_gpu() -> None:
    """On a CPU, with a tiny model: each variant has the vectors of fp32 and a rate, and the engine runs with each policy."""
    output = _run("gpu", "--device", "cpu", "--models", "BERT base")
    rows = _table(output, "The backend")
    variants = ["packed fp16", "packed bf16", "padded fp16", "padded fp32", "sentence-transformers"]
    expected = [["BERT base", kind, name] for name in variants for kind in ("short", "doc", "long")]
    assert [row[:3] for row in rows] == expected
    assert all(float(row[3]) > 0.999 and _is_positive(row[4]) for row in rows)
    served = _table(output, "As served")
    assert len(served) == 12
    assert all(_is_positive(cell) for row in served for cell in row[3:])


def test_kills_of_services() -> None:
    """Each line is in the files once, and the files are those of a service that was not killed."""
    (row,) = _table(_run("batch_kills", "--service"), "Killed services")
    assert row[4:] == ["yes", "yes", "yes"]
    assert int(row[1]) >= 1


def test_batch_kills() -> None:
    """With both databases, killed workers change nothing in the files of a batch."""
    rows = _table(_run("batch_kills"), "Killed workers")
    assert [row[0] for row in rows] in (["SQLite", "PostgreSQL"], ["SQLite"])
    assert all(row[5:8] == ["yes"] * 3 for row in rows)
    assert all(int(row[8]) <= int(row[10]) for row in rows)


def test_soak() -> None:
    """Under load, with injected failures and an end of the process, no response is lost, wrong or unexpected."""
    output = _run("soak")
    counts = {row[0].strip("*"): row[1] for row in _table(output, "Result")}
    assert {counts["wrong responses"], counts["lost responses"], counts["unexpected statuses"]} == {"0"}
    assert _is_positive(counts["expected responses"])
    assert int(counts["service processes"]) > 1
    assert _table(output, "Injected failures")


def _run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{program}", "--quick", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def _table(output: str, title: str) -> list[list[str]]:
    """Return the cells of the table below a title, without the head."""
    section = output.split(f"## {title}", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def _is_positive(cell: str) -> bool:
    return re.fullmatch(r"[\d,.]+", cell) is not None and float(cell.replace(",", "")) > 0
