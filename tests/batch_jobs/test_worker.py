"""A worker takes a batch through its states, and nothing that a client or the model does stops it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.batch_worker import HashCalculator
from emb_model_provider.batch_jobs.segments import SegmentStore
from emb_model_provider.errors import (
    DeadlineExceededError,
    DeviceLostError,
    InferenceError,
    InputTooLongError,
    ModelNotReadyError,
    QueueFullError,
    RequestError,
)
from tests.batch_jobs.helpers import ids, line, lines, process, reach, reach_no_segments, read_lines, working

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from emb_model_provider.batch_jobs.types import Answer
    from tests.batch_jobs.helpers import Jobs


async def test_completed(jobs: Jobs) -> None:
    """Output in the order of the input, counts and times; the segments are gone."""
    content = lines(20) + line("long", body={"model": "m", "input": "too long"}) + line("last")
    batch = jobs.create(content)
    async with working(jobs, HashCalculator()):
        batch = await reach(jobs, batch, "completed")
        await reach_no_segments(jobs)
    assert (batch.state, batch.total, batch.completed, batch.failed, batch.model) == ("completed", 22, 21, 1, "m")
    output, errors = read_lines(jobs, batch.output_file_id), read_lines(jobs, batch.error_file_id)
    assert [each["custom_id"] for each in output] == [*(f"line-{number}" for number in range(20)), "last"]
    first = output[0]
    expected = list(hashlib.sha256(b'"text of line-0"').digest())
    assert first["response"]["body"] == {"data": [{"embedding": expected}], "id": first["response"]["request_id"]}
    assert (first["response"]["status_code"], first["error"]) == (200, None)
    assert len({each["id"] for each in output}) == 21
    (error,) = errors
    assert (error["custom_id"], error["response"]["status_code"], error["error"]) == ("long", 400, None)
    assert error["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert batch.tokens == sum(len(f'"text of line-{number}"') for number in range(20)) + len('"text of last"')
    times = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert None not in times
    assert list(times) == sorted(times)  # type: ignore[type-var]
    file = jobs.files.get("", batch.output_file_id or "")
    assert (file.purpose, file.filename, file.owner) == ("batch_output", f"{batch.id}_output.jsonl", "")
    assert file.bytes == jobs.files.content("", file.id).stat().st_size
    assert len(list(jobs.files.directory.iterdir())) == 3


async def test_output_is_the_same_each_time(jobs: Jobs) -> None:
    """However the lines are divided into chunks."""
    batches = [await process(jobs, lines(20), chunk_inputs=size, parallel=size) for size in (1, 7, 100)]
    contents = {jobs.files.content("", batch.output_file_id or "").read_bytes() for batch in batches}
    assert len(contents) == 1


async def test_lines_of_many_inputs(jobs: Jobs) -> None:
    """A chunk has about the same number of inputs, at least one line, and at most `chunk_bytes` bytes."""
    content = b"".join(
        line(str(number), body={"input": ["text"] * inputs}) for number, inputs in enumerate((20, 3, 5, 1))
    )
    batch = jobs.create(content)
    segments = []

    class Calculator(HashCalculator):
        async def answer(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Answer:
            segments.append(len(body["input"]))
            if len(segments) == 3:
                names = [path.name for path in (jobs.directory / "segments" / batch.id).iterdir()]
                assert names == ["000000.1.jsonl"]
            return await super().answer(endpoint, body, request_id)

    async with working(jobs, Calculator(), parallel=1):
        batch = await reach(jobs, batch, "completed")
    assert segments == [20, 3, 5, 1]
    assert ids(jobs, batch.output_file_id) == ["0", "1", "2", "3"]


GOOD = line("a")
INVALID = {
    "empty": (b"", [("empty_file", None, None)]),
    "blank": (b"\n \r\n", [("empty_file", None, None)]),
    "no-json": (GOOD + b"{'custom_id'\n", [("invalid_json_line", 2, None)]),
    "no-object": (b"[1]\n", [("invalid_json_line", 1, None)]),
    "nul": (b"\0" + GOOD, [("invalid_json_line", 1, None)]),
    "utf-16": ("{}\n".encode("utf-16"), [("invalid_json_line", 1, None), ("invalid_json_line", 2, None)]),
    "binary": (bytes(range(128, 256)), [("invalid_json_line", 1, None)]),
    "custom-id-surrogate": (line("\ud800"), [("invalid_custom_id", 1, "custom_id")]),
    "deep": (b"[" * 100_000 + b"\n", [("invalid_json_line", 1, None)]),
    "duplicate": (GOOD + line("b") + GOOD, [("duplicate_custom_id", 3, "custom_id")]),
    "no-custom-id": (line("a", custom_id=None), [("missing_required_parameter", 1, "custom_id")]),
    "custom-id-number": (line("a", custom_id=7), [("invalid_custom_id", 1, "custom_id")]),
    "custom-id-empty": (line(""), [("invalid_custom_id", 1, "custom_id")]),
    "custom-id-long": (line("a" * 513), [("invalid_custom_id", 1, "custom_id")]),
    "method": (line("a", method="GET"), [("invalid_method", 1, "method")]),
    "url": (line("a", url="/v1/rerank"), [("invalid_url", 1, "url")]),
    "no-body": (line("a", body=None), [("missing_required_parameter", 1, "body")]),
    "body-text": (line("a", body="text"), [("invalid_type", 1, "body")]),
    "body-invalid": (line("a", body={}), [("missing_required_parameter", 1, "body.input")]),
    "stream": (line("a", body={"input": "a", "stream": True}), [("unsupported_value", 1, "body.stream")]),
    "too-many-lines": (lines(31), [("too_many_lines", 31, None)]),
    "too-many-inputs": (GOOD + line("b", body={"input": ["a"] * 40}), [("too_many_inputs", 2, None)]),
    "huge-line": (GOOD + b"x" * 300_000 + b"\n" + line("b"), [("line_too_long", 2, None)]),
    "huge-last-line": (b"x" * 300_000, [("line_too_long", 1, None)]),
    "several": (
        GOOD + b"{\n" + line("b", method="PUT"),
        [("invalid_json_line", 2, None), ("invalid_method", 3, "method")],
    ),
}


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
@pytest.mark.parametrize("name", INVALID)
async def test_invalid_files(jobs: Jobs, name: str) -> None:
    """Nothing runs, and each error names its line."""
    content, expected = INVALID[name]
    calculator = HashCalculator()
    batch = await process(jobs, content, calculator=calculator, max_lines=30, max_inputs=40, max_line_bytes=200_000)
    assert batch.state == "failed"
    assert batch.failed_at is not None
    assert [(error.code, error.line, error.param) for error in batch.errors] == expected
    assert (batch.output_file_id, batch.error_file_id, batch.total) == (None, None, 0)
    assert not calculator.computed
    assert all(len(error.message) < 300 for error in batch.errors)


async def test_errors_that_the_database_could_not_store(jobs: Jobs) -> None:
    """PostgreSQL stores no NUL."""
    batch = await process(jobs, line("a", method="\0\x1f", body={"model": "\0"}))
    assert [error.code for error in batch.errors] == ["invalid_method"]
    batch = await process(jobs, line("\0", body={"model": "\0", "input": "\0"}))
    assert ids(jobs, batch.output_file_id) == ["\0"]


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
async def test_many_errors(jobs: Jobs) -> None:
    batch = await process(jobs, b"{\n" * 1000)
    assert [error.line for error in batch.errors] == list(range(1, 101))


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + lines(3),
        lines(3).replace(b"\n", b"\r\n"),
        lines(3).replace(b"\n", b"\n\n \n"),
        lines(3).removesuffix(b"\n"),
        b"\n" + lines(3) + b"\n\n",
        b"\xef\xbb\xbf\r\n" + lines(3),
    ],
    ids=["bom", "crlf", "empty-lines", "no-end", "empty-first", "bom-alone"],
)
async def test_forms_of_files(jobs: Jobs, content: bytes) -> None:
    for chunk_inputs in (1, 2, 8):
        batch = await process(jobs, content, chunk_inputs=chunk_inputs)
        assert (batch.state, batch.total) == ("completed", 3)
        assert ids(jobs, batch.output_file_id) == ["line-0", "line-1", "line-2"]


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
async def test_a_file_that_changed_on_disk(jobs: Jobs) -> None:
    batch = jobs.create(lines(3))
    jobs.files.path(batch.input_file_id).write_bytes(lines(4))
    async with working(jobs, HashCalculator()):
        batch = await reach(jobs, batch, "failed")
    assert [error.code for error in batch.errors] == ["file_changed"]


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
async def test_a_file_that_another_replica_has(jobs: Jobs) -> None:
    """The batch waits with a reason, because the directory may only be missing here."""
    batch = jobs.create(lines(3))
    path = jobs.files.path(batch.input_file_id)
    moved = path.rename(jobs.directory / "moved")
    async with working(jobs, HashCalculator()):
        paused = await reach(jobs, batch, lambda current: current.pause_reason)
        assert "No such file" in (paused.pause_reason or "")
        moved.rename(path)
        batch = await reach(jobs, batch, "completed")
    assert batch.pause_reason is None


class Failing(HashCalculator):
    """Fails in the first attempts for some texts."""

    def __init__(self, error: BaseException, attempts: int, condition: Callable[[str], bool] = lambda _: True) -> None:
        super().__init__()
        self.error, self.attempts, self.condition = error, attempts, condition

    async def answer(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Answer:
        text = body["input"]
        if self.condition(text) and self.computed[json.dumps(text)] < self.attempts:
            self.count(body)
            raise self.error
        return await super().answer(endpoint, body, request_id)


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
@pytest.mark.parametrize(
    "error",
    [
        ModelNotReadyError("The model is loading.", retry_after_s=0.01),
        QueueFullError("The queue is full.", retry_after_s=0.01),
        DeviceLostError("The GPU is lost."),
        DeadlineExceededError("It took too long.", can_repeat=True),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_passing_errors(jobs: Jobs, error: BaseException) -> None:
    """Only the lines that failed are computed again."""
    calculator = Failing(error, 2, lambda text: text.endswith("3"))
    batch = await process(jobs, lines(10), calculator=calculator, stall_s=60)
    assert (batch.completed, batch.failed, batch.pause_reason) == (10, 0, None)
    assert calculator.computed['"text of line-3"'] == 3
    assert calculator.computed.total() == 12


async def test_a_model_that_is_not_ready_for_long(jobs: Jobs) -> None:
    """The batch says why it waits, and batches of other models are computed."""

    class Calculator(HashCalculator):
        is_ready = False

        async def answer(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Answer:
            if body["model"] == "a" and not self.is_ready:
                raise ModelNotReadyError("The model `a` is loading.", retry_after_s=0.01)
            return await super().answer(endpoint, body, request_id)

    def content(model: str) -> bytes:
        return b"".join(line(str(number), body={"model": model, "input": str(number)}) for number in range(50))

    waiting = jobs.create(content("a"))
    calculator = Calculator()
    async with working(jobs, calculator, stall_s=0.05) as worker:
        await reach(jobs, waiting, lambda batch: batch.pause_reason == "The model `a` is loading.")
        assert worker.pauses == {waiting.id: "The model `a` is loading."}
        other = jobs.create(content("b"))
        worker.wake()
        assert (await reach(jobs, other, "completed")).completed == 50
        calculator.is_ready = True
        assert (await reach(jobs, waiting, "completed")).pause_reason is None


class Unready(HashCalculator):
    """Has no time for texts that end with 3."""

    is_ready = False

    async def answer(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Answer:
        if body["input"].endswith("3") and not self.is_ready:
            raise ModelNotReadyError("The model is loading.", retry_after_s=0.01)
        return await super().answer(endpoint, body, request_id)


async def test_lines_of_a_model_that_is_not_ready(jobs: Jobs) -> None:
    """All other lines of the batch are computed, once, and recorded. These come when the model is ready."""
    batch = jobs.create(lines(50))
    calculator = Unready()
    async with working(jobs, calculator, stall_s=0.05):
        while calculator.computed.total() < 45:
            await asyncio.sleep(0.01)
        await reach(jobs, batch, lambda current: current.pause_reason == "The model is loading.")
    calculator.is_ready = True
    async with working(jobs, calculator):
        batch = await reach(jobs, batch, "completed")
    assert ids(jobs, batch.output_file_id) == [f"line-{number}" for number in range(50)]
    assert set(calculator.computed.values()) == {1}
    assert batch.tokens == sum(len(f'"text of line-{number}"') for number in range(50))
    assert (batch.completed, batch.failed, batch.pause_reason) == (50, 0, None)


async def test_lines_of_a_model_that_is_never_ready(jobs: Jobs) -> None:
    """They fail after a while, and the batch is completed."""
    batch = await process(jobs, lines(50), calculator=Unready(), stall_s=0.0, max_wait_s=0.2)
    assert (batch.state, batch.completed, batch.failed) == ("completed", 45, 5)
    errors = read_lines(jobs, batch.error_file_id)
    assert [each["custom_id"] for each in errors] == [f"line-{number}" for number in (3, 13, 23, 33, 43)]
    assert {each["response"]["status_code"] for each in errors} == {503}
    assert {each["response"]["body"]["error"]["code"] for each in errors} == {"model_not_ready"}


async def test_cancel_while_lines_wait_for_their_model(jobs: Jobs) -> None:
    batch = jobs.create(lines(50))
    calculator = Unready()
    async with working(jobs, calculator, stall_s=0.0) as worker:
        while calculator.computed.total() < 45:
            await asyncio.sleep(0.01)
        jobs.batches.cancel("", batch.id)
        worker.wake()
        batch = await reach(jobs, batch, "cancelled")
    assert (batch.completed, batch.failed) == (45, 5)
    assert ids(jobs, batch.error_file_id) == [f"line-{number}" for number in (3, 13, 23, 33, 43)]


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
async def test_a_part_of_a_chunk_that_was_damaged_on_disk(jobs: Jobs) -> None:
    """It is computed again."""
    batch = jobs.create(lines(8))
    calculator = Unready()
    async with working(jobs, calculator, stall_s=0.0):
        await reach(jobs, batch, lambda _: list(jobs.directory.glob("segments/*/*.jsonl")))
    (path,) = jobs.directory.glob("segments/*/*.jsonl")
    path.write_bytes(path.read_bytes().replace(b"line-1", b"line-9"))
    calculator.is_ready = True
    async with working(jobs, calculator):
        batch = await reach(jobs, batch, "completed")
    assert ids(jobs, batch.output_file_id) == [f"line-{number}" for number in range(8)]
    assert (batch.completed, batch.tokens) == (8, sum(len(f'"text of line-{number}"') for number in range(8)))


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
def test_a_log_of_crashes_that_a_crash_of_the_machine_damaged(jobs: Jobs) -> None:
    """Its other entries count, and the batch continues."""
    store = SegmentStore(jobs.directory)
    (jobs.directory / "segments" / "batch").mkdir(parents=True)
    (jobs.directory / "segments" / "batch" / "000003.log").write_bytes(b"+5\n+7\n-7\n+5\n+\n\0\0\0\0\n+")
    with store.crash_log("batch", 3) as log:
        assert [log.crashes_at(number) for number in (5, 7)] == [2, 0]


async def test_validation_while_the_model_is_not_ready(jobs: Jobs) -> None:
    class Calculator(HashCalculator):
        checks = 0

        def check(self, endpoint: str, body: Mapping[str, Any]) -> int:
            self.checks += 1
            if self.checks == 2:
                raise ModelNotReadyError("The model is loading.", retry_after_s=0.01)
            return super().check(endpoint, body)

    assert (await process(jobs, lines(5), calculator=Calculator())).completed == 5


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("No.", param="input", code="no"), 400, "no"),
        (DeadlineExceededError("It took too long.", can_repeat=False), 504, "timeout"),
        (DeadlineExceededError("It took too long.", can_repeat=True), 504, "timeout"),
        (ValueError("a secret of the server"), 500, "internal_error"),
    ],
    ids=["request", "timeout", "timeouts", "defect"],
)
async def test_failing_lines(jobs: Jobs, error: Exception, status: int, code: str) -> None:
    calculator = Failing(error, 100, lambda text: text.endswith("3"))
    batch = await process(jobs, lines(5), calculator=calculator)
    assert (batch.state, batch.completed, batch.failed) == ("completed", 4, 1)
    (failed,) = read_lines(jobs, batch.error_file_id)
    assert failed["custom_id"] == "line-3"
    assert failed["response"]["status_code"] == status
    assert failed["response"]["body"]["error"]["code"] == code
    assert "secret" not in json.dumps(failed)


class Grouping(HashCalculator):
    """Computes the lines of each model together."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[list[str]] = []
        """The texts of each group that was computed."""

    def group(self, endpoint: str, bodies: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        groups: dict[str, list[int]] = {}
        for position, body in enumerate(bodies):
            groups.setdefault(body["model"], []).append(position)
        return list(groups.values())

    async def answer_group(self, endpoint: str, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
        self.groups.append([body["input"] for body in bodies])
        return [await self.answer(endpoint, body, "") for body in bodies]


def texts(*values: str, model: str = "m") -> bytes:
    return b"".join(line(text, body={"model": model, "input": text}) for text in values)


async def test_groups(jobs: Jobs) -> None:
    """The lines of two models are computed in two groups, and the output is in the order of the input."""
    calculator = Grouping()
    content = texts("a", "b") + texts("x", model="n") + texts("c") + texts("y", model="n") + texts("z", model="o")
    batch = await process(jobs, content, calculator=calculator)
    assert calculator.groups == [["a", "b", "c"], ["x", "y"]]
    assert ids(jobs, batch.output_file_id) == ["a", "b", "x", "c", "y", "z"]


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
async def test_invalid_lines_of_a_group_fail_alone(jobs: Jobs) -> None:
    """The group is divided until the others are computed without them."""

    class Calculator(Grouping):
        async def answer_group(self, endpoint: str, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
            if any(body["input"] == "too long" for body in bodies):
                raise InputTooLongError(0, 512)
            return await super().answer_group(endpoint, bodies)

    calculator = Calculator()
    content = texts("a", "b", "c", "too long") + texts("e", "f", "g", "h")
    batch = await process(jobs, content, calculator=calculator)
    assert sorted(calculator.groups) == [["a", "b"], ["e", "f", "g", "h"]]
    assert ids(jobs, batch.output_file_id) == ["a", "b", "c", "e", "f", "g", "h"]
    (failed,) = read_lines(jobs, batch.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("too long", 400)


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
@pytest.mark.parametrize(
    ("error", "groups"),
    [
        (ModelNotReadyError("The model is loading.", retry_after_s=0.01), 1),
        (DeviceLostError("The GPU is lost."), 1),
        (asyncio.CancelledError(), 1),
        (QueueFullError("The queue is full.", retry_after_s=0.01), 2),
        (InferenceError("The model failed."), 0),
        (ValueError("a defect"), 0),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_groups_that_fail(jobs: Jobs, error: BaseException, groups: int) -> None:
    """The group is tried again or divided, or its lines are computed alone, also in later attempts. No line fails."""

    class Calculator(Grouping):
        is_first = is_later = False

        async def answer_group(self, endpoint: str, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
            if not self.is_first:
                self.is_first = True
                raise error
            return await super().answer_group(endpoint, bodies)

        async def answer(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Answer:
            if not self.is_later and not groups:
                self.is_later = True
                raise ModelNotReadyError("The model is restarted.", retry_after_s=0.01)
            return await super().answer(endpoint, body, request_id)

    calculator = Calculator()
    batch = await process(jobs, texts("a", "b", "c", "d"), calculator=calculator, stall_s=60)
    assert (batch.completed, batch.failed, len(calculator.groups)) == (4, 0, groups)
    assert sorted(text for group in calculator.groups for text in group) == ["a", "b", "c", "d"][: 4 * bool(groups)]
    assert set(calculator.computed.values()) == {1}


async def test_cancel_while_a_group_runs(jobs: Jobs) -> None:
    """The group is cancelled, and none of its lines is in the output."""

    class Calculator(Grouping):
        async def answer_group(self, endpoint: str, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
            if len(self.groups) == 2:
                running.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled.set()
            return await super().answer_group(endpoint, bodies)

    running, cancelled = asyncio.Event(), asyncio.Event()
    batch = jobs.create(lines(50))
    async with working(jobs, Calculator()) as worker:
        await reach(jobs, batch, lambda current: current.completed == 16)
        await asyncio.wait_for(running.wait(), 20)
        jobs.batches.cancel("", batch.id)
        worker.wake()
        batch = await reach(jobs, batch, "cancelled")
        await asyncio.wait_for(cancelled.wait(), 20)
    assert (batch.total, batch.completed, batch.failed) == (50, 16, 34)
    assert ids(jobs, batch.output_file_id) == [f"line-{number}" for number in range(16)]


async def test_only_failing_lines(jobs: Jobs) -> None:
    batch = await process(jobs, line("a", body={"input": "too long"}))
    assert (batch.state, batch.output_file_id, batch.failed) == ("completed", None, 1)
    assert ids(jobs, batch.error_file_id) == ["a"]


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
async def test_a_defect_in_a_check_fails_the_batch(jobs: Jobs) -> None:
    class Calculator(HashCalculator):
        def check(self, endpoint: str, body: Mapping[str, Any]) -> int:
            raise ZeroDivisionError("a secret of the server")

    batch = await process(jobs, lines(1), calculator=Calculator())
    assert [(error.code, error.line) for error in batch.errors] == [("internal_error", 1)]
    assert "secret" not in batch.errors[0].message


class Gate(HashCalculator):
    """Answers the first lines, and the others when the gate opens."""

    def __init__(self, answered: int) -> None:
        super().__init__()
        self.answered = answered
        self.gate = asyncio.Event()

    async def answer(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Answer:
        self.answered -= 1
        if self.answered < 0:
            await self.gate.wait()
        return await super().answer(endpoint, body, request_id)


async def test_cancel_while_running(jobs: Jobs) -> None:
    """What is computed is kept, also of chunks that are not done. The other lines are in the error file."""
    batch = jobs.create(lines(50))
    calculator = Gate(29)
    async with working(jobs, calculator) as worker:
        await reach(jobs, batch, lambda current: current.completed == 24)
        while calculator.computed.total() < 29:
            await asyncio.sleep(0.01)
        jobs.batches.cancel("", batch.id)
        worker.wake()
        batch = await reach(jobs, batch, "cancelled")
        await reach_no_segments(jobs)
    assert (batch.total, batch.completed, batch.failed) == (50, 29, 21)
    assert batch.tokens == sum(len(f'"text of line-{number}"') for number in range(29))
    assert ids(jobs, batch.output_file_id) == [f"line-{number}" for number in range(29)]
    errors = read_lines(jobs, batch.error_file_id)
    assert [each["custom_id"] for each in errors] == [f"line-{number}" for number in range(29, 50)]
    assert {(each["response"], each["error"]["code"]) for each in errors} == {(None, "batch_cancelled")}
    assert None not in (batch.cancelling_at, batch.cancelled_at)


async def test_a_chunk_that_needs_little_time_after_a_cancel(jobs: Jobs) -> None:
    """It is computed, instead of losing the work on it."""
    batch = jobs.create(lines(50))
    calculator = Gate(24)
    async with working(jobs, calculator, parallel=1, grace_s=60) as worker:
        await reach(jobs, batch, lambda current: current.completed == 24)
        while calculator.answered >= 0:
            await asyncio.sleep(0.01)
        jobs.batches.cancel("", batch.id)
        worker.wake()
        await asyncio.sleep(0.2)
        assert jobs.batches.get("", batch.id).state == "cancelling"
        calculator.gate.set()
        batch = await reach(jobs, batch, "cancelled")
    assert (batch.completed, batch.failed) == (32, 18)
    assert ids(jobs, batch.output_file_id) == [f"line-{number}" for number in range(32)]


async def test_another_worker_ends_a_cancelled_batch(jobs: Jobs) -> None:
    """It waits for what the others have computed."""
    batch = jobs.create(lines(64))
    calculator = Gate(24)
    async with working(jobs, calculator, count=3) as worker:
        await reach(jobs, batch, lambda current: current.completed >= 8)
        while calculator.computed.total() < 24:
            await asyncio.sleep(0.01)
        jobs.batches.cancel("", batch.id)
        worker.wake()
        batch = await reach(jobs, batch, "cancelled")
    assert (batch.completed, batch.failed) == (24, 40)
    found = [*ids(jobs, batch.output_file_id), *ids(jobs, batch.error_file_id)]
    assert sorted(found) == sorted(f"line-{number}" for number in range(64))


async def test_cancel_before_validation(jobs: Jobs) -> None:
    batch = jobs.create(lines(5))
    jobs.batches.cancel("", batch.id)
    async with working(jobs, HashCalculator()):
        batch = await reach(jobs, batch, "cancelled")
    assert (batch.output_file_id, batch.error_file_id) == (None, None)


async def test_expiry_while_running(jobs: Jobs) -> None:
    """What is computed is kept; the other lines are in the error file, which has the order of the input."""
    content = line("long", body={"input": "too long"}) + lines(49)
    batch = jobs.create(content)
    calculator = Gate(29)
    async with working(jobs, calculator, lease_s=48 * 3600):
        await reach(jobs, batch, lambda current: current.completed + current.failed == 24)
        while calculator.computed.total() < 29:
            await asyncio.sleep(0.01)
        jobs.later_s = 24 * 3600 + 1
        batch = await reach(jobs, batch, "expired")
    assert (batch.total, batch.completed, batch.failed) == (50, 28, 22)
    assert ids(jobs, batch.output_file_id) == [f"line-{number}" for number in range(28)]
    errors = read_lines(jobs, batch.error_file_id)
    assert [each["custom_id"] for each in errors] == ["long", *(f"line-{number}" for number in range(28, 49))]
    assert errors[1]["response"] is None
    assert {each["error"]["code"] for each in errors[1:]} == {"batch_expired"}
    assert batch.expired_at is not None


async def test_expiry_before_validation(jobs: Jobs) -> None:
    batch = jobs.create(lines(5))
    jobs.later_s = 24 * 3600 + 1
    async with working(jobs, HashCalculator()):
        batch = await reach(jobs, batch, "expired")
    assert [error.code for error in batch.errors] == ["batch_expired"]


async def test_output_files_expire(jobs: Jobs) -> None:
    batch = jobs.create(lines(5), output_expires_after_s=3600)
    async with working(jobs, HashCalculator(), sweep_s=0.05):
        batch = await reach(jobs, batch, "completed")
        file = jobs.files.get("", batch.output_file_id or "")
        assert file.expires_at == file.created_at + 3600
        jobs.later_s = 3601
        path = jobs.files.path(file.id)
        while path.exists():
            await asyncio.sleep(0.02)
    assert jobs.files.path(batch.input_file_id).exists()


async def test_a_stopped_worker_returns_its_work(jobs: Jobs) -> None:
    """Another one goes on at once, although the leases were long."""
    batch = jobs.create(lines(50), metadata={"a": "b"})
    async with working(jobs, Gate(24), lease_s=3600):
        await reach(jobs, batch, lambda current: current.completed == 24)
    calculator = HashCalculator()
    async with working(jobs, calculator, lease_s=3600):
        batch = await reach(jobs, batch, "completed")
    assert calculator.computed.total() == 26
    assert len(ids(jobs, batch.output_file_id)) == 50


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
async def test_batches_take_turns(jobs: Jobs) -> None:
    """A small batch does not wait for the end of a large one."""
    large = jobs.create(lines(400))
    async with working(jobs, HashCalculator(line_s=0.002)) as worker:
        await reach(jobs, large, lambda current: current.completed)
        small = jobs.create(lines(8))
        worker.wake()
        await reach(jobs, small, "completed")
        assert jobs.batches.get("", large.id).state == "in_progress"
