"""Reads and validates input files, and writes the lines of output and error files."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from emb_model_provider.batch_jobs.batches import LineError
from emb_model_provider.concurrency import Turns
from emb_model_provider.error_table import UNEXPECTED, error_info
from emb_model_provider.errors import ProviderError, RequestError, RetryLaterError
from emb_model_provider.formatting import quote
from emb_model_provider.json_parser import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO

    from emb_model_provider.batch_jobs.batches import Batch
    from emb_model_provider.batch_jobs.types import Answer, Limits, WorkerOptions

logger = logging.getLogger(__name__)

_BOM = b"\xef\xbb\xbf"
_MAX_ERRORS = 100
"""Errors of a file that are reported. Validation then stops."""
_MAX_CUSTOM_ID = 512
_CHECK_EVERY_LINES = 256
_UNANSWERED = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not executed, because the batch was cancelled.",
}


@dataclass(frozen=True, slots=True)
class InputLine:
    """A request of an input file."""

    number: int
    """Its line in the file, from 1."""
    custom_id: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive lines that are computed together."""

    offset: int
    bytes: int
    first_line: int
    lines: int
    """Without empty lines."""


@dataclass(frozen=True, slots=True)
class Validation:
    """The result of validating an input file: chunks, or errors."""

    chunks: tuple[Chunk, ...]
    model: str | None
    errors: tuple[LineError, ...]

    @property
    def lines(self) -> int:
        return sum(chunk.lines for chunk in self.chunks)


def validate_file(
    path: Path,
    batch: Batch,
    sha256: str,
    check: Callable[[str, Mapping[str, Any]], int],
    limits: Limits,
    options: WorkerOptions,
    raise_if_stopped: Callable[[], None],
) -> Validation:
    """Check every line of an input file, and divide the file into chunks.

    Raises:
        RetryLaterError: A line cannot be checked now.
        OSError: The file cannot be read.
    """
    turns = Turns()
    validator = _Validator(batch.endpoint, check, limits, options)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for number, offset, raw in _read_raw(stream, limits.max_line_bytes, digest.update):
            if number % _CHECK_EVERY_LINES == 0:
                raise_if_stopped()
            validator.add(number, offset, raw)
            if validator.is_over:
                break
            turns.give()
    if not validator.errors and digest.hexdigest() != sha256:
        validator.errors.append(
            LineError(
                "file_changed", "The content of the input file changed on the disk of the server. Upload it again."
            )
        )
    return validator.result()


def read_chunk(path: Path, chunk: Chunk, endpoint: str) -> list[InputLine]:
    """Read the lines of a chunk of a valid file."""
    with path.open("rb") as stream:
        stream.seek(chunk.offset)
        content = stream.read(chunk.bytes)
    found = [
        InputLine(number, *parse_line(raw, endpoint))
        for number, raw in enumerate(content.split(b"\n"), chunk.first_line)
        if raw.strip()
    ]
    if len(found) != chunk.lines:
        raise OSError(f"the input file {path} has changed: {len(found)} lines in the place of {chunk.lines}")
    return found


def parse_line(raw: bytes, endpoint: str) -> tuple[str, dict[str, Any]]:
    """Return the custom_id and the body of a line, or raise RequestError."""
    try:
        line = parse_json(raw.decode())
    except ValueError:
        raise RequestError("This line is not parseable as valid JSON.", code="invalid_json_line") from None
    if not isinstance(line, dict):
        raise RequestError("This line is not a JSON object.", code="invalid_json_line")
    for name in ("custom_id", "method", "url", "body"):
        if line.get(name) is None:
            raise RequestError(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    custom_id, method, url, body = line["custom_id"], line["method"], line["url"], line["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_CUSTOM_ID or not _is_unicode(custom_id):
        message = f"Invalid 'custom_id' {quote(custom_id)}: it is a string of 1 to {_MAX_CUSTOM_ID} characters."
        raise RequestError(message, param="custom_id", code="invalid_custom_id")
    if method != "POST":
        raise RequestError(f"Invalid 'method' {quote(method)}: it is 'POST'.", param="method", code="invalid_method")
    if url != endpoint:
        message = f"The url {quote(url)} does not match the endpoint of the batch, '{endpoint}'."
        raise RequestError(message, param="url", code="invalid_url")
    if not isinstance(body, dict):
        raise RequestError("Invalid 'body': it is the object of a request.", param="body", code="invalid_type")
    return custom_id, body


def _is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogate, which no file can have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def line_id(prefix: str, sha256: str, number: int) -> str:
    """Return the id of a line or of its request, which is the same whenever and wherever the line is computed."""
    return f"{prefix}_{hashlib.sha256(f'{prefix}:{sha256}:{number}'.encode()).hexdigest()[:32]}"


def answered_line(sha256: str, line: InputLine, answer: Answer) -> bytes:
    """Return a line of the output or error file."""
    # Not encoded again, because the numbers of vectors are most of the bytes.
    body = answer.body if b"\n" not in answer.body else orjson.dumps(orjson.loads(answer.body))
    return b'{"id":"%b","custom_id":%b,"response":{"status_code":%d,"request_id":"%b","body":%b},"error":null}\n' % (
        line_id("batch_req", sha256, line.number).encode(),
        orjson.dumps(line.custom_id),
        answer.status_code,
        line_id("req", sha256, line.number).encode(),
        body,
    )


def id_of_line(line: bytes) -> str:
    """Return the id in a line of the output or error file."""
    return line.split(b'"', 4)[3].decode()


def unanswered_line(sha256: str, line: InputLine, code: str) -> bytes:
    """Return a line of the error file for a request that was not computed: `batch_expired` or `batch_cancelled`."""
    fields = {
        "id": line_id("batch_req", sha256, line.number),
        "custom_id": line.custom_id,
        "response": None,
        "error": {"code": code, "message": _UNANSWERED[code]},
    }
    return orjson.dumps(fields) + b"\n"


def error_body(error: BaseException) -> tuple[int, bytes]:
    """Return the status and the body of the answer to a line that failed, in OpenAI's form."""
    info = error_info(error)
    if info is UNEXPECTED or not isinstance(error, ProviderError):
        logger.error("a line of a batch failed: %s: %s", type(error).__name__, error, exc_info=error)
        message = "The server failed to process this request. See its log."
    else:
        message = error.message.encode("utf-8", "replace").decode()
    kind = "server_error" if info.status >= 500 else "invalid_request_error"
    param = error.param if isinstance(error, RequestError) else None
    return info.status, _body(message, kind, param, info.code)


def crash_body() -> tuple[int, bytes]:
    """Return the status and the body of the answer to a line that ends the process which computes it."""
    message = "The process of the server ended each time it computed this request."
    return UNEXPECTED.status, _body(message, "server_error", None, UNEXPECTED.code)


def _body(message: str, kind: str, param: str | None, code: str) -> bytes:
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


class _Validator:
    """The lines of a file so far."""

    def __init__(
        self, endpoint: str, check: Callable[[str, Mapping[str, Any]], int], limits: Limits, options: WorkerOptions
    ) -> None:
        self._endpoint = endpoint
        self._check = check
        self._limits = limits
        self._options = options
        self._custom_ids: dict[bytes, int] = {}
        """Line by hash, because 50,000 names can be long."""
        self._chunks: list[Chunk] = []
        self._model: str | None = None
        self._inputs = 0
        self._lines = 0
        self._start: tuple[int, int] | None = None
        """Offset and number of the first line of the present chunk."""
        self._end = 0
        self._chunk_lines = 0
        self._chunk_inputs = 0
        self.errors: list[LineError] = []
        self.is_over = False
        """Whether the remaining lines need not be checked."""

    def add(self, number: int, offset: int, raw: bytes | None) -> None:
        """Check a line. None: it is too long."""
        if raw is not None and not raw.strip():
            return
        self._lines += 1
        if self._lines > self._limits.max_lines:
            limit = self._limits.max_lines
            self._fail(LineError("too_many_lines", f"The file has more than {limit} lines. Divide it.", number))
            self.is_over = True
            return
        try:
            inputs = self._check_line(number, raw)
        except RetryLaterError:
            raise
        except Exception as error:  # noqa: BLE001 - an unexpected error is logged, and fails the batch
            self._fail(_line_error(error, number))
            return
        if self._inputs > self._limits.max_inputs:
            limit = self._limits.max_inputs
            self._fail(LineError("too_many_inputs", f"The file has more than {limit} inputs. Divide it.", number))
            self.is_over = True
            return
        size = len(raw or b"")
        if self._start is not None and (
            self._chunk_inputs + inputs > self._options.chunk_inputs
            or offset + size - self._start[0] > self._options.chunk_bytes
        ):
            self._close_chunk()
        if self._start is None:
            self._start = (offset, number)
        self._end = offset + size
        self._chunk_lines += 1
        self._chunk_inputs += inputs

    def result(self) -> Validation:
        if not self.errors and not self._lines:
            self.errors.append(LineError("empty_file", "The input file contains no requests."))
        if self.errors:
            return Validation((), self._model, tuple(self.errors))
        self._close_chunk()
        return Validation(tuple(self._chunks), self._model, ())

    def _check_line(self, number: int, raw: bytes | None) -> int:
        """Return the number of inputs of a line."""
        if raw is None:
            message = f"This line is longer than {self._limits.max_line_bytes} bytes. Divide the request."
            raise RequestError(message, code="line_too_long")
        custom_id, body = parse_line(raw, self._endpoint)
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        if (first := self._custom_ids.setdefault(digest, number)) != number:
            raise RequestError(
                f"The custom_id {quote(custom_id)} is a duplicate of that of line {first}.",
                param="custom_id",
                code="duplicate_custom_id",
            )
        if body.get("stream"):
            raise RequestError("Batches do not support streaming.", param="body.stream", code="unsupported_value")
        try:
            inputs = self._check(self._endpoint, body)
        except RequestError as error:
            param = f"body.{error.param}" if error.param else "body"
            raise RequestError(error.message, param=param, code=error.code) from error
        self._inputs += inputs
        if self._model is None and isinstance(body.get("model"), str):
            self._model = body["model"][:_MAX_CUSTOM_ID].replace("\0", "")
        return inputs

    def _close_chunk(self) -> None:
        assert self._start is not None  # noqa: S101 - a chunk has lines
        offset, number = self._start
        self._chunks.append(Chunk(offset, self._end - offset, number, self._chunk_lines))
        self._start, self._chunk_lines, self._chunk_inputs = None, 0, 0

    def _fail(self, error: LineError) -> None:
        self.errors.append(error)
        self.is_over = len(self.errors) >= _MAX_ERRORS


def _line_error(error: Exception, number: int) -> LineError:
    info = error_info(error)
    if not isinstance(error, ProviderError):
        logger.error("line %d of a batch could not be checked", number, exc_info=error)
        return LineError(info.code, "The server failed to check this line. See its log.", number)
    param = error.param if isinstance(error, RequestError) else None
    return LineError(info.code, error.message, number, param)


def _read_raw(
    stream: BinaryIO, limit: int, update: Callable[[bytes], object]
) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield number, offset and content of each line; None in the place of the content if it is longer than `limit`."""
    number = offset = 0
    while raw := stream.readline(limit + 2):
        update(raw)
        number += 1
        start, content = offset, raw.removesuffix(b"\n")
        offset += len(raw)
        is_too_long = len(content) > limit
        while not raw.endswith(b"\n") and (raw := stream.readline(1 << 20)):
            update(raw)
            offset += len(raw)
            is_too_long = True
        if number == 1 and content.startswith(_BOM):
            content = content.removeprefix(_BOM)
            start += len(_BOM)
        yield number, start, None if is_too_long else content
