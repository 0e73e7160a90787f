"""The syntax of `.env` files, and the precedence of the environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import SettingsError
from emb_model_provider.settings.loading import read_environment

if TYPE_CHECKING:
    from pathlib import Path


def read(tmp_path: Path, text: str, **environ: str) -> dict[str, str]:
    file = tmp_path / ".env"
    file.write_bytes(text.encode())
    return read_environment(file, environ)


def test_json_can_span_lines_without_quotes(tmp_path: Path) -> None:
    """An unquoted JSON object ends at its closing brace. The following lines are read as usual."""
    values = read(tmp_path, 'A=1\nM={\n  "x": {"y": "}"},\n  "z": [1,\n2]\n}\nB=2\n')
    assert values == {"A": "1", "M": '{\n  "x": {"y": "}"},\n  "z": [1,\n2]\n}', "B": "2"}


def test_json_can_be_followed_by_a_comment(tmp_path: Path) -> None:
    """The comment is not part of the value."""
    assert read(tmp_path, 'M={"a": 1} # why\nB=2') == {"M": '{"a": 1}', "B": "2"}


@pytest.mark.parametrize("text", ["M='{\"a\": 1}'", 'M={"a": 1}', 'export M={"a": 1}', ' M = {"a": 1}'])
def test_json_on_one_line_can_be_quoted(tmp_path: Path, text: str) -> None:
    """Quotes, `export` and spaces do not change the value."""
    assert read(tmp_path, text) == {"M": '{"a": 1}'}


def test_windows_files_are_read(tmp_path: Path) -> None:
    """A byte order mark and CRLF are ignored, and backslashes in paths are kept."""
    values = read(tmp_path, '\ufeffA=D:\\cache\\modelscope\r\nM={\r\n"a": 1\r\n}\r\nB=2\r\n')
    assert values == {"A": "D:\\cache\\modelscope", "M": '{\n"a": 1\n}', "B": "2"}


def test_environment_takes_precedence_over_the_file(tmp_path: Path) -> None:
    """A variable of the process overrides the same variable of the file."""
    assert read(tmp_path, "A=file\nB=file", A="process") == {"A": "process", "B": "file"}


def test_empty_value_is_unset(tmp_path: Path) -> None:
    """Guides leave values empty to select the default."""
    assert read(tmp_path, "A=\nB=  \nC=1", D="") == {"C": "1"}


def test_empty_environment_variable_overrides_the_file(tmp_path: Path) -> None:
    """An empty variable of the process unsets the value of the file."""
    assert read(tmp_path, "A=file", A="") == {}


def test_missing_file_is_not_an_error(tmp_path: Path) -> None:
    """Without a `.env` only the environment is read."""
    assert read_environment(tmp_path / "none", {"A": "1"}) == {"A": "1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('A=1\nM={\n "a": }\n', "M is not valid JSON, line 3 column 7"),
        ('M={"a": 1\n', "M is not valid JSON"),
        ('M={"a": 1} {"b": 2}\n', "M: unexpected text after its JSON in line 1"),
    ],
)
def test_error_locates_invalid_json(tmp_path: Path, text: str, message: str) -> None:
    """The error names the file, the variable and the line."""
    with pytest.raises(SettingsError, match=message) as caught:
        read(tmp_path, text)
    assert ".env" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_file_is_an_error(tmp_path: Path) -> None:
    """A `.env` that is not text is reported."""
    (tmp_path / ".env").write_bytes(b"\xff\xfe\x00A")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_environment(tmp_path / ".env", {})
