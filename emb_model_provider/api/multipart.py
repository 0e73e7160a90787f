"""Parses `multipart/form-data` bodies as they arrive, so that a file of any size takes little memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from emb_model_provider.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 64 * 1024
"""Longest value of a field that is not a file."""
_EXAMPLE = "as `curl -F purpose=batch -F file=@requests.jsonl` does"


class Sink(Protocol):
    """Takes the content of a file in order."""

    def write(self, data: bytes, /) -> object: ...


class FormParser:
    """A form with one file. Not thread-safe; it can be used on one thread after the other."""

    def __init__(self, content_type: str, file_field: str, open_file: Callable[[str], Sink]) -> None:
        """Create a parser for a body with this Content-Type.

        Args:
            content_type: The header, with the boundary of the parts.
            file_field: The name of the field that has the file.
            open_file: Returns where the content of the file goes. Called with its name when its part begins.

        Raises:
            RequestError: The body is not `multipart/form-data`.
        """
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise RequestError(
                f"Send the file as multipart/form-data with the fields 'purpose' and '{file_field}', {_EXAMPLE}.",
                param=file_field,
                code="invalid_content_type",
            )
        self.fields: dict[str, str] = {}
        """The values of the fields that are not the file."""
        self.is_complete = False
        """Whether the end of the form has been parsed."""
        self._file_field = file_field
        self._open_file = open_file
        self._has_file = False
        self._sink: Sink | None = None
        """Where the data of the current part goes; None if the part is a field."""
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._name = ""
        self._value = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_begin": self._on_header_begin,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise _invalid(error) from None

    def feed(self, data: bytes) -> None:
        """Parse the next piece of the body.

        Raises:
            RequestError: The body is not a valid form.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _invalid(error) from None

    def close(self) -> None:
        """Check that the form is complete and has a file; raise RequestError if not."""
        if not self.is_complete:
            raise RequestError(
                "The upload ends before its last boundary. Send it again.", param=self._file_field, code="invalid_form"
            )
        if not self._has_file:
            raise RequestError(
                f"Missing required parameter: '{self._file_field}'. Send the file, {_EXAMPLE}.",
                param=self._file_field,
                code="missing_required_parameter",
            )

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_begin(self) -> None:
        self._header = (bytearray(), bytearray())

    def _on_header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name != self._file_field:
            if len(self.fields) >= _MAX_FIELDS:
                raise RequestError(f"The form has more than {_MAX_FIELDS} fields.", code="invalid_form")
            self._value = bytearray()
            return
        if self._has_file:
            raise RequestError(
                f"The form has '{self._file_field}' twice. Upload each file by a request of its own.",
                param=self._file_field,
                code="invalid_form",
            )
        self._has_file = True
        self._sink = self._open_file(options.get(b"filename", b"").decode("utf-8", "replace") or self._file_field)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._sink is not None:
            self._sink.write(data[start:end])
            return
        if len(self._value) + end - start > _MAX_FIELD_BYTES:
            raise RequestError(f"The value of '{self._name[:100]}' is too long.", param=self._name[:100])
        self._value += data[start:end]

    def _on_part_end(self) -> None:
        if self._sink is None:
            self.fields[self._name] = self._value.decode("utf-8", "replace")
        self._sink = None

    def _on_end(self) -> None:
        self.is_complete = True


def _invalid(error: FormParserError) -> RequestError:
    return RequestError(
        f"The body is not valid multipart/form-data: {error}. Send the file {_EXAMPLE}.", code="invalid_form"
    )
