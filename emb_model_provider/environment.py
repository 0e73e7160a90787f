"""Names and values as the user wrote them: the process environment over `.env`.

Nothing here knows what a name means; `settings` does.
"""

from __future__ import annotations

import io
import json
import os
import re
from typing import TYPE_CHECKING

from dotenv import dotenv_values

from emb_model_provider.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_JSON_ASSIGNMENT = re.compile(
    r"^[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*(?=[{\[])", re.MULTILINE
)
_REST_OF_LINE = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\n|\Z)")


def read_environment(env_file: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return every variable that has a value. An empty value means unset, in either place.

    Raises: SettingsError if `env_file` is there but cannot be read, or holds JSON that does not end.
    """
    values = _read_env_file(env_file)
    values.update(environ)
    return {name: value.strip() for name, value in values.items() if value.strip()}


def _read_env_file(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path} cannot be read ({error}): make it a readable UTF-8 text file."
        ) from error
    rest, json_values = _take_json_values(text.replace("\r\n", "\n"), path)
    plain = dotenv_values(stream=io.StringIO(rest), interpolate=False)
    return {**{name: value for name, value in plain.items() if value is not None}, **json_values}


def _take_json_values(text: str, path: Path) -> tuple[str, dict[str, str]]:
    """Cut unquoted JSON values, which may span lines, out of `text`: dotenv parsers end them at the first line."""
    decoder = json.JSONDecoder()
    values: dict[str, str] = {}
    kept: list[str] = []
    position = 0
    while match := _JSON_ASSIGNMENT.search(text, position):
        name, start = match.group(1), match.end()
        try:
            _, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise SettingsError(f"{path}: {name} is not valid JSON, {_where(error)}.") from error
        trailing = _REST_OF_LINE.match(text, end)
        if trailing is None:
            line = text.count("\n", 0, end) + 1
            raise SettingsError(
                f"{path}: {name}: something stands behind its JSON in line {line}: remove it."
            )
        kept.append(text[position : match.start()])
        values[name] = text[start:end]
        position = trailing.end()
    kept.append(text[position:])
    return "".join(kept), values


def _where(error: json.JSONDecodeError) -> str:
    return f"line {error.lineno} column {error.colno}: {error.msg}"
