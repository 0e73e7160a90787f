"""Bulk jobs: formats, columns, errors, options, shards and resuming."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from emb_model_provider import Embedder
from emb_model_provider.bulk.job import Shard, run_job
from emb_model_provider.errors import BulkError, DimensionsError, InvalidBulkJobError, RequestError
from emb_model_provider.progress import ignore_progress
from emb_model_provider.settings import Settings
from emb_model_provider.snapshots.locks import lock_exclusive
from tests.bulk.helpers import files, json_lines, options, read, run, texts, write_rows

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("short_collections")

ROWS = [{"id": f"doc-{index}", "text": text} for index, text in enumerate(texts(250))]


@pytest.mark.parametrize("output", ["parquet", "npy", "jsonl"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_vectors_are_those_of_the_embedder(
    ending: str, output: str, settings: Settings, embedder: Embedder, tmp_path: Path
) -> None:
    """In the order of the rows, bit by bit, in parts of the requested size."""
    source = write_rows(tmp_path / f"in.{ending}", ROWS)
    counts = run(options(source, tmp_path / "out", format=output), settings)
    written = read(tmp_path / "out", output)
    assert written.numbers == list(range(250))
    assert written.ids == [row["id"] for row in ROWS]
    assert np.array_equal(written.vectors, embedder.embed([row["text"] for row in ROWS]))
    assert written.errors == []
    assert (counts.total_rows, counts.done_rows, counts.failed_rows, counts.total_parts) == (250, 250, 0, 3)
    assert counts.tokens > 250


def test_parquet_parts_have_vectors_of_a_fixed_size(settings: Settings, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS[:3])
    run(options(source, tmp_path / "out"), settings)
    schema = pq.read_schema(tmp_path / "out" / "part-00000.parquet")
    assert [(field.name, field.type) for field in schema] == [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("embedding", pa.list_(pa.field("element", pa.float32(), nullable=False), 24)),
    ]


def test_ids_keep_their_type_in_json(settings: Settings, tmp_path: Path) -> None:
    """Integers and texts, also the same one twice, because rows differ in their numbers. Parquet has texts."""
    ids = [7, "7", "a", "a"]
    source = write_rows(tmp_path / "in.jsonl", [{"id": each, "text": "the fox"} for each in ids])
    run(options(source, tmp_path / "json", format="jsonl"), settings)
    run(options(source, tmp_path / "parquet"), settings)
    assert read(tmp_path / "json", "jsonl").ids == ids
    assert read(tmp_path / "parquet").ids == ["7", "7", "a", "a"]
    assert read(tmp_path / "parquet").numbers == [0, 1, 2, 3]


def test_without_an_id_column_rows_have_numbers_only(settings: Settings, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", ROWS[:3])
    for output in ("parquet", "npy", "jsonl"):
        run(options(source, tmp_path / output, identifier=None, format=output), settings)
        assert read(tmp_path / output, output).numbers == [0, 1, 2]
    assert pq.read_schema(tmp_path / "parquet" / "part-00000.parquet").names == ["row", "embedding"]
    assert json_lines(tmp_path / "npy" / "part-00000.ids.jsonl")[0] == {"row": 0}


def test_rows_that_fail_do_not_stop_the_job(settings: Settings, embedder: Embedder, tmp_path: Path) -> None:
    """Each is in the errors file with its number, its id and the reason; the numbers of the others do not change."""
    lines = [
        b'\xef\xbb\xbf{"id": "good", "text": "the fox"}',
        b"{not json}",
        b"[1]",
        b"",
        b'{"id": "null", "text": null}',
        b'{"id": "number", "text": 5}',
        b'{"id": "none"}',
        b'{"text": "no id"}',
        b'{"id": 1.5, "text": "a fraction"}',
        b'{"id": true, "text": "a truth value"}',
        b'{"id": "bytes", "text": "\xff\xfe"}',
        b'{"id": "empty", "text": ""}\r',
        b'{"id": "last", "text": "the river"}',
    ]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(lines))
    counts = run(options(source, tmp_path / "out"), settings)
    written = read(tmp_path / "out")
    assert (written.numbers, written.ids) == ([0, 10, 11], ["good", "empty", "last"])
    assert np.array_equal(written.vectors, embedder.embed(["the fox", "", "the river"]))
    reasons = {error["row"]: (error["id"], error["reason"]) for error in written.errors}
    assert list(reasons) == list(range(1, 10))
    assert "not valid JSON" in reasons[1][1]
    assert reasons[2] == (None, "it is not a JSON object")
    assert reasons[3] == ("null", "'text' is null")
    assert reasons[4] == ("number", "'text' is 5, not a string")
    assert reasons[5] == ("none", "it has no column 'text'")
    assert reasons[6] == (None, "it has no column 'id'")
    assert reasons[7] == (None, "'id' is 1.5, not a string or an integer")
    assert "not valid JSON" in reasons[9][1]
    assert (counts.failed_rows, counts.done_rows) == (9, 12)


def test_csv_of_other_programs(settings: Settings, embedder: Embedder, tmp_path: Path) -> None:
    """A byte order mark, line breaks and quotes in quoted texts, short rows, blank lines and invalid bytes."""
    source = tmp_path / "in.csv"
    source.write_bytes(
        b'\xef\xbb\xbfid,text,other\r\na,"the ""fox""\r\nand the river",x\r\n\r\nb\r\n,no id,x\r\nc,\xc4\xe3\xba\xc3,x\r\nd,"",x\r\n'
        b'e,' + "你好".encode() + b',x'
    )  # fmt: skip
    run(options(source, tmp_path / "out"), settings)
    written = read(tmp_path / "out")
    assert (written.numbers, written.ids) == ([0, 4, 5], ["a", "d", "e"])
    assert np.array_equal(written.vectors, embedder.embed(['the "fox"\r\nand the river', "", "你好"]))
    assert [(error["row"], error["id"]) for error in written.errors] == [(1, "b"), (2, None), (3, "c")]
    assert "not valid UTF-8" in written.errors[2]["reason"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
        pa.string_view(),
    ],
    ids=str,
)
def test_parquet_with_other_types_of_text(kind: Any, settings: Settings, embedder: Embedder, tmp_path: Path) -> None:
    """Nulls fail, and integer ids are allowed."""
    values = ["the fox", None, "the river", "the fox"] * 50
    table = pa.table({"n": pa.array(range(200), pa.int32()), "body": pa.array(values, pa.string()).cast(kind)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=33)
    run(options(tmp_path / "in.parquet", tmp_path / "out", text="body", identifier="n", format="jsonl"), settings)
    written = read(tmp_path / "out", "jsonl")
    kept = [index for index, value in enumerate(values) if value is not None]
    assert written.numbers == written.ids == kept
    assert np.array_equal(written.vectors, embedder.embed([value for value in values if value is not None]))
    assert [(error["row"], error["reason"]) for error in written.errors] == [
        (index, "'body' is null") for index in range(1, 200, 4)
    ]


def test_parquet_with_invalid_utf8(settings: Settings, tmp_path: Path) -> None:
    """The row fails, and no other."""
    values = pa.array([b"the fox", b"\xff\xfe", b"the river"]).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "in.parquet")
    run(options(tmp_path / "in.parquet", tmp_path / "out", identifier=None), settings)
    written = read(tmp_path / "out")
    assert written.numbers == [0, 2]
    assert written.errors == [{"row": 1, "id": None, "reason": "the value of 'text' is not valid UTF-8"}]


def test_an_empty_input_has_no_parts(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").touch()
    (tmp_path / "in.csv").write_text("id,text\n")
    pq.write_table(
        pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / "in.parquet"
    )
    for ending in ("jsonl", "csv", "parquet"):
        counts = run(options(tmp_path / f"in.{ending}", tmp_path / ending), settings)
        assert (counts.total_rows, counts.total_parts) == (0, 0)
        assert list(files(tmp_path / ending)) == ["_manifest.json"]


REFUSED = {
    "no-file.jsonl": (None, "does not exist"),
    "in.txt": (b"the fox", r"unknown format.*\.jsonl.*\.parquet"),
    "column.jsonl": (
        b'{"id": "a", "body": "b", "txt": "c"}\n',
        r"no column 'text'.*'id', 'body', 'txt'.*--text-column.*'txt'",
    ),
    "id.jsonl": (b'{"text": "a", "key": 1}\n', r"no column 'id'.*'text', 'key'.*--id-column"),
    "array.jsonl": (b"[\n1\n]\n", "None of the first 3 rows.*Row 0.*not valid JSON"),
    "empty.csv": (b"", "no column 'text'. Its columns: none"),
    "column.csv": (b"id,body\na,b\n", "no column 'text'. Its columns: 'id', 'body'"),
    "twice.csv": (b"id,text,text\na,b,c\n", "2 columns 'text'"),
    "utf16.csv": ("id,text\na,b\n".encode("utf-16"), "UTF-16.*iconv"),
    "gbk.csv": ("编号,正文\na,b\n".encode("gbk"), "not valid UTF-8.*iconv"),
    "quote.csv": (b'id,text\na,b\nc,"open\nd,e\n', "quote that is not closed in the row at byte 12"),
    "mac.csv": (b"id,text\na,b\rc,d\n", "not valid CSV near line 2"),
    "damaged.parquet": (b"PAR1 nothing PAR1", "not a valid Parquet file"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_input_that_cannot_be_read_is_refused_before_the_model_is_loaded(name: str, tmp_path: Path) -> None:
    """With what is wrong, and what to do. Nothing is written."""
    content, message = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidBulkJobError, match=message):
        run(options(tmp_path / name, tmp_path / "out"), Settings.from_values(cache_dir=str(tmp_path)), source="local")
    assert not [*tmp_path.glob("out/part-*")]


def test_parquet_columns_of_other_types_are_refused(settings: Settings, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1.5], "text": [b"a"]}), tmp_path / "in.parquet")
    with pytest.raises(InvalidBulkJobError, match=r"'text'.*has the type binary, and must have text"):
        run(options(tmp_path / "in.parquet", tmp_path / "out"), settings)
    pq.write_table(pa.table({"id": [1.5], "text": ["a"]}), tmp_path / "in.parquet")
    with pytest.raises(InvalidBulkJobError, match=r"'id'.*has the type double.*integers.*--id-column"):
        run(options(tmp_path / "in.parquet", tmp_path / "out"), settings)


def test_options_of_the_model(settings: Settings, embedder: Embedder, tmp_path: Path) -> None:
    """Smaller vectors; what the model does not have is refused, with the message of a request."""
    source = write_rows(tmp_path / "in.jsonl", ROWS[:20])
    run(options(source, tmp_path / "out", dimensions=8), settings)
    vectors = embedder.embed([row["text"] for row in ROWS[:20]], dimensions=8)
    assert np.array_equal(read(tmp_path / "out").vectors, vectors)
    with pytest.raises(DimensionsError):
        run(options(source, tmp_path / "new", dimensions=9), settings)
    with pytest.raises(RequestError, match="input_type"):
        run(options(source, tmp_path / "new", input_type="nonsense"), settings)
    assert not [*tmp_path.glob("new/*.parquet")]


def test_prompts_are_applied_and_pinned(model: Path, tmp_path: Path) -> None:
    mapping = {"static": {"path": str(model), "prompts": {"query": "river: ", "document": "stone: "}}}
    settings = Settings.from_values(cache_dir=str(tmp_path / "cache"), offline=True, model_mapping=mapping)
    source = write_rows(tmp_path / "in.jsonl", ROWS[:20])
    run(options(source, tmp_path / "query", input_type="query"), settings)
    run(options(source, tmp_path / "document", input_type="document"), settings)
    assert not np.allclose(read(tmp_path / "query").vectors, read(tmp_path / "document").vectors, atol=1e-3)
    with pytest.raises(InvalidBulkJobError, match="prompt is 'river: ' there and 'stone: ' here"):
        run(options(source, tmp_path / "query", input_type="document"), settings)


def test_texts_that_are_too_long(model: Path, tmp_path: Path) -> None:
    """They are cut by default. With NONE they fail, and the texts next to them do not."""
    mapping = {"static": {"path": str(model), "max_length": 20}}
    settings = Settings.from_values(cache_dir=str(tmp_path / "cache"), offline=True, model_mapping=mapping)
    rows = [{"id": index, "text": "the fox " * (100 if index % 7 == 3 else 2)} for index in range(250)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert run(options(source, tmp_path / "cut"), settings).failed_rows == 0
    counts = run(options(source, tmp_path / "refused", truncate="NONE"), settings)
    written, long = read(tmp_path / "refused"), list(range(3, 250, 7))
    assert [error["row"] for error in written.errors] == [error["id"] for error in written.errors] == long
    assert {error["reason"] for error in written.errors} == {"the text has more than 20 tokens"}
    assert written.numbers == [index for index in range(250) if index not in long]
    cut = read(tmp_path / "cut").vectors
    assert np.array_equal(written.vectors, cut[written.numbers])
    assert counts.failed_rows == len(long)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_shards_together_have_each_row_once(ending: str, settings: Settings, tmp_path: Path) -> None:
    """In the files of a job without shards, whatever their number; a further start has nothing to do."""
    source = write_rows(tmp_path / f"in.{ending}", ROWS)
    run(options(source, tmp_path / "whole", part_rows=40), settings)
    whole = files(tmp_path / "whole")
    assert len(whole) == 8
    for count in (2, 5, 9):
        out = tmp_path / str(count)
        done = [run(options(source, out, part_rows=40, shard=Shard(index, count)), settings) for index in range(count)]
        assert sum(counts.total_rows for counts in done) == 250
        assert files(out) == whole
    counts = run(options(source, tmp_path / "5", part_rows=40), settings)
    assert (counts.resumed_rows, counts.tokens) == (250, 0)


@pytest.mark.parametrize("output", ["parquet", "npy", "jsonl"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_missing_parts_are_written_again(ending: str, output: str, settings: Settings, tmp_path: Path) -> None:
    """From any gap, to the same bytes; the errors of the other parts still count."""
    rows = [{**row, "text": None if index % 50 == 0 else row["text"]} for index, row in enumerate(ROWS)]
    if ending == "csv":
        rows = [{"id": "" if row["text"] is None else row["id"], "text": row["text"]} for row in rows]
    source = write_rows(tmp_path / f"in.{ending}", rows)
    job = options(source, tmp_path / "out", part_rows=30, format=output)
    run(job, settings)
    before = files(tmp_path / "out")
    for part in (1, 2, 5, 8):
        (tmp_path / "out" / f"part-{part:05d}.{output}").unlink()
    counts = run(job, settings)
    assert files(tmp_path / "out") == before
    assert (counts.resumed_rows, counts.failed_rows, counts.done_rows) == (150, 5, 250)


def test_another_job_does_not_continue(settings: Settings, tmp_path: Path) -> None:
    """The message says what differs, and what to do. Nothing is changed."""
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    out = tmp_path / "out"
    run(options(source, out), settings)
    before = files(out)
    with pytest.raises(InvalidBulkJobError, match=r"part_rows is 100 there and 50 here.*another --out, or delete"):
        run(options(source, out, part_rows=50), settings)
    with pytest.raises(InvalidBulkJobError, match="format is 'parquet' there and 'npy' here"):
        run(options(source, out, format="npy"), settings)
    with pytest.raises(InvalidBulkJobError, match="dimensions is 24 there and 16 here"):
        run(options(source, out, dimensions=16), settings)
    with pytest.raises(InvalidBulkJobError, match="id_column is 'id' there and None here"):
        run(options(source, out, identifier=None), settings)
    write_rows(source, [*ROWS[:-1], {"id": "doc-249", "text": "changed"}])
    with pytest.raises(InvalidBulkJobError, match=r"input_sha256 is '[0-9a-f]{64}' there and '[0-9a-f]{64}' here"):
        run(options(source, out), settings)
    assert files(out) == before


def test_another_model_does_not_continue(model: Path, settings: Settings, tmp_path: Path) -> None:
    """A model with other weights; a directory that was moved is the same model."""
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    run(options(source, tmp_path / "out"), settings)
    moved = Settings.from_values(cache_dir=str(tmp_path / "cache"), offline=True)
    shutil.copytree(model, tmp_path / "copy")
    counts = run(options(source, tmp_path / "out"), moved, model=str(tmp_path / "copy"))
    assert counts.resumed_rows == 250
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    save_file({name: values + 1 for name, values in tensors.items()}, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(InvalidBulkJobError, match="model_sha256 is"):
        run(options(source, tmp_path / "out"), moved, model=str(tmp_path / "copy"))


def test_a_damaged_manifest_is_refused(settings: Settings, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS[:3])
    run(options(source, tmp_path / "out"), settings)
    for content in ("{", "[]", json.dumps({"version": 99})):
        (tmp_path / "out" / "_manifest.json").write_text(content)
        with pytest.raises(InvalidBulkJobError, match="Choose another --out"):
            run(options(source, tmp_path / "out"), settings)


def test_a_part_that_another_process_writes_is_refused(settings: Settings, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    (tmp_path / "out").mkdir()
    with (
        lock_exclusive(tmp_path / "out" / ".part-00001.lock"),
        pytest.raises(BulkError, match=r"Another process.*--shard"),
    ):
        run(options(source, tmp_path / "out"), settings)
    assert [*files(tmp_path / "out")] == ["_manifest.json", "part-00000.parquet"]
    run(options(source, tmp_path / "out"), settings)
    assert read(tmp_path / "out").numbers == list(range(250))


def test_an_input_that_changes_meanwhile_ends_the_job(settings: Settings, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)

    def load() -> Embedder:
        write_rows(source, ROWS[:-1])
        return Embedder(settings=settings).load()

    with pytest.raises(InvalidBulkJobError, match="has changed during the job"):
        run_job(options(source, tmp_path / "out"), load, ignore_progress, lambda _: None)
    assert not [*tmp_path.glob("out/*.parquet")]


def test_without_pyarrow_the_message_says_how_to_install_it(tmp_path: Path) -> None:
    """Other formats do not need it."""
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    program = (
        "import sys\n"
        "sys.modules['pyarrow'] = None\n"
        "from emb_model_provider.cli.main import main\n"
        "main(['embed', 'in.jsonl', '--out', 'out', '--model', '/nowhere', '--source', 'local', *sys.argv[1:]])\n"
    )

    def failed(*arguments: str) -> str:
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "pip install 'emb-model-provider[parquet]'" in failed()
    assert re.search("/nowhere.*does not exist", failed("--format", "npy"))
