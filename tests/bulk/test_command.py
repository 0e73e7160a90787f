"""`emb-provider embed IN --out DIR` as a process: kills, interrupts, full disks, output and wrong usage."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.bulk.helpers import files, read, texts, write_rows
from tests.cli.helpers import invoke, run, start
from tests.service import BUNDLED, environment, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider import Embedder

_ROWS = 40_000
_KILLS = 4


@pytest.fixture(scope="module")
def command(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments of a job of several seconds, which has parts of well under a second."""
    source = tmp_path_factory.mktemp("input") / "in.jsonl"
    rows = [{"id": index, "text": text} for index, text in enumerate(texts(_ROWS))]
    for index in range(0, _ROWS, 999):
        rows[index]["text"] = None
    write_rows(source, rows)
    return [
        "embed",
        str(source),
        "--id-column",
        "id",
        "--part-rows",
        "1000",
        "--model",
        str(model),
        "--source",
        "local",
    ]


@pytest.fixture(scope="module")
def undisturbed(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    done = run(directory, *command, "--out", "out", "--progress", "plain", "--json")
    assert done.returncode == 0, done.stderr
    assert "40,000 of 40,000 rows (100 %), " in done.stderr
    assert " rows/s, " in done.stderr
    assert "41 rows have no vector. The reasons are in out/_errors-*.jsonl." in done.stderr
    result = json.loads(done.stdout)
    assert (result["rows"], result["failed_rows"], result["parts"]) == (_ROWS, 41, 40)
    return directory / "out"


def count_parts(out: Path) -> int:
    return len([*out.glob("part-*.parquet")])


@pytest.mark.slow
def test_vectors_after_kills_are_those_without(
    command: list[str], undisturbed: Path, embedder: Embedder, tmp_path: Path
) -> None:
    """SIGKILL at random moments: each row is exactly once in the parts or the errors, and all files have the same bytes.

    At most one part is lost at each kill.
    """
    out, moments = tmp_path / "out", random.Random(5)  # noqa: S311 - not for cryptography
    for number in range(_KILLS):
        before = count_parts(out)
        with start(tmp_path, *command, "--out", "out", "--progress", "none") as process:
            wanted = before + moments.randrange(1, 5)
            wait_until(lambda wanted=wanted, process=process: count_parts(out) >= wanted or process.poll() is not None)
            time.sleep(moments.random() * 0.2)
            process.kill()
        assert process.returncode == -signal.SIGKILL, f"it ended before kill {number}"
        kept = files_of_parts(out)
        assert before < len(kept) < 40
        assert kept.items() <= files(undisturbed).items()
    done = run(tmp_path, *command, "--out", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_rows"] == 1000 * len(kept)
    assert files(out) == files(undisturbed)
    written = read(out)
    assert sorted([*written.numbers, *(error["row"] for error in written.errors)]) == list(range(_ROWS))
    assert written.ids == [str(number) for number in written.numbers]
    some, all_texts = written.numbers[::8], texts(_ROWS)
    assert np.array_equal(written.vectors[::8], embedder.embed([all_texts[number] for number in some]))


def files_of_parts(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("part-*.parquet")}


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_can_be_resumed(command: list[str], undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start(tmp_path, *command, "--out", "out") as process:
        wait_until(lambda: count_parts(out) >= 2 or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (130, "")
    assert "interrupted: the complete parts in out are kept. To continue, run the same command again." in stderr
    assert "Traceback" not in stderr
    done = run(tmp_path, *command, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert files(out) == files(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["parquet", "npy", "jsonl"])
def test_full_disk_keeps_the_complete_parts(output: str, command: list[str], tmp_path: Path) -> None:
    """A limit of the size of files stands for the disk: a part that is larger fails, and none of it is left."""
    limited = [sys.executable, "-c", LIMITED, *command[1:], "--out", "out", "--format", output]
    done = subprocess.run(
        limited, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 1, done.stderr
    assert "No space left in out (File too large). Free some space and run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.glob("out/part-*")]
    assert not [*tmp_path.glob("out/.*.tmp")]


LIMITED = """
import resource, sys
from emb_model_provider.cli.main import main
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
main(["embed", *sys.argv[1:]])
"""


def test_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the option and what to do, and no model is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')

    def refused(*arguments: str) -> str:
        result = invoke("embed", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        return result.stderr

    assert "--text-column needs --out" in refused("hello", "--text-column", "body")
    assert "--format needs --out" in refused("hello", "--format", "npy")
    assert "pass one file, not 2 arguments" in refused("in.jsonl", "in.jsonl", "--out", "out")
    assert "numbered from 0, so of 4 the last is 3/4" in refused("in.jsonl", "--out", "out", "--shard", "4/4")
    assert "not of the form I/N" in refused("in.jsonl", "--out", "out", "--shard", "4")
    assert "is a file" in refused("in.jsonl", "--out", "in.jsonl")
    assert "The input none.jsonl does not exist" in refused("none.jsonl", "--out", "out")
    assert "has no column 'body'. Its columns: 'text'" in refused("in.jsonl", "--out", "out", "--text-column", "body")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_compiled_model_has_the_vectors_of_the_printed_form(service_cache: str, tmp_path: Path) -> None:
    """With the model that is bundled, whose vectors depend a little on the batch: the same up to rounding."""
    rows = [{"text": text} for text in texts(300)]
    write_rows(tmp_path / "in.jsonl", rows)
    done = run(
        tmp_path,
        "embed",
        "in.jsonl",
        "--out",
        "out",
        "--model",
        BUNDLED,
        "--dimensions",
        "384",
        CACHE_DIR=service_cache,
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "in.txt").write_text("".join(row["text"] + "\n" for row in rows))
    printed = run(tmp_path, "embed", "@in.txt", "--model", BUNDLED, CACHE_DIR=service_cache)
    expected = np.array([json.loads(line) for line in printed.stdout.splitlines()], dtype=np.float32)
    assert (read(tmp_path / "out").vectors * expected).sum(1).min() > 0.999
