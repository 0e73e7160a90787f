"""Read the settings: variables to values, and every mistake to one line that says what is allowed."""

from __future__ import annotations

import difflib
import io
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotenv import dotenv_values
from pydantic import ValidationError

from emb_model_provider.errors import SettingsError
from emb_model_provider.settings import PREFIX, MappingEntry, Settings, allowed_values

if TYPE_CHECKING:
    from collections.abc import Mapping


_JSON_SETTINGS: Mapping[str, str] = {
    "model_mapping": '{"alias": {"name": "owner/model"}}',
    "fidelity_floors": '{"int8": 0.99}',
    "hub_names": '{"acme/model": {"modelscope": "other/model"}}',
}
"""Fields of Settings that are written as JSON objects, each with an example."""

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "MODEL_SOURCE": ("MODEL_HUB", "USE_MODELSCOPE"),
    "MODELSCOPE_CACHE_DIR": ("MODELSCOPE_CACHE", "MODEL_CACHE_DIR"),
    "MODELSCOPE_ENDPOINT": ("MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"),
    "MODELSCOPE_TOKEN": ("MODELSCOPE_API_TOKEN",),
    "HF_CACHE_DIR": ("HF_HUB_CACHE", "HF_HOME", "MODEL_CACHE_DIR"),
    "HF_ENDPOINT": ("HF_ENDPOINT",),
    "HF_TOKEN": ("HF_TOKEN",),
    "OFFLINE": ("HF_HUB_OFFLINE",),
}
"""Setting to variables that users of the hubs already have; read where the setting itself is unset."""


def load_settings(
    env_file: Path = Path(".env"), environ: Mapping[str, str] = os.environ
) -> tuple[Settings, list[str]]:
    """Read the settings, and what to warn about: names that look like settings and are none.

    Raises: SettingsError with one line that names the variable, its value and what is allowed.
    """
    variables = read_environment(env_file, environ)
    warnings = _unknown_names(variables)
    values = _values(variables)
    try:
        return Settings(**values), warnings
    except ValidationError as error:
        raise SettingsError(_one_line(error, values)) from None


def _values(variables: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field_name in Settings.model_fields:
        setting = field_name.upper()
        if PREFIX + setting in variables:
            values[field_name] = variables[PREFIX + setting]
            continue
        for name in OTHER_NAMES.get(setting, ()):
            if name in variables:
                values[field_name] = _translated(name, variables[name])
                break
    for field_name, example in _JSON_SETTINGS.items():
        if field_name in values:
            values[field_name] = _parsed_object(PREFIX + field_name.upper(), values[field_name], example)
    return values


def _translated(name: str, value: str) -> str:
    """Return what a variable of another tool means as the value of a setting of ours."""
    if name == "USE_MODELSCOPE":
        meaning = {"true": "modelscope", "1": "modelscope", "yes": "modelscope", "on": "modelscope"}
        off = {"false": "huggingface", "0": "huggingface", "no": "huggingface", "off": "huggingface"}
        if value.lower() not in meaning | off:
            raise SettingsError(f"USE_MODELSCOPE={value}: must be true or false.")
        return (meaning | off)[value.lower()]
    if name == "MODEL_HUB" and value.lower() not in ("modelscope", "huggingface"):
        raise SettingsError(f"MODEL_HUB={value}: must be modelscope or huggingface.")
    if name == "HF_HOME":
        return str(Path(value) / "hub")
    if name == "MODELSCOPE_DOMAIN" and "://" not in value:
        return f"https://{value}"
    return value


def _parsed_object(variable: str, text: str, example: str) -> Any:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise SettingsError(
                f"{variable} says {', '.join(sorted(map(repr, twice)))} more than once: keep one."
            )
        return dict(pairs)

    try:
        mapping = json.loads(text, object_pairs_hook=without_duplicates)
    except json.JSONDecodeError as error:
        raise SettingsError(
            f"{variable} is not valid JSON, line {error.lineno} column {error.colno}: {error.msg}."
        ) from None
    if not isinstance(mapping, dict):
        raise SettingsError(f"{variable}: must be a JSON object like {example}.")
    return mapping


def _unknown_names(variables: Mapping[str, str]) -> list[str]:
    known = [name.upper() for name in Settings.model_fields]
    warnings = []
    for name in sorted(variables):
        setting = name.upper().removeprefix(PREFIX)
        if setting == name.upper() or name in (PREFIX + each for each in known):
            continue
        near = difflib.get_close_matches(setting, known, n=1)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else "see docs/configuration.md."
        warnings.append(f"{name} is no setting and is ignored: {hint}")
    return warnings


def _one_line(error: ValidationError, values: Mapping[str, Any]) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    path = [str(part) for part in first["loc"]]
    info = Settings.model_fields[path[0]]
    variable = PREFIX + path[0].upper()
    if path[0] == "model_mapping":
        return _mapping_line(variable, path[1:], first)
    allowed = allowed_values(info)
    shown = "(hidden)" if "SecretStr" in str(info.annotation) else values[path[0]]
    if path[0] in _JSON_SETTINGS:
        shown = json.dumps(shown)
    return (
        f"{variable}={shown}: must be {_one_of(allowed)}."
        if allowed
        else f"{variable}={shown}: {first['msg']}."
    )


def _one_of(allowed: str) -> str:
    return f"one of {allowed}" if ", " in allowed and " or " not in allowed else allowed


def _mapping_line(variable: str, path: list[str], error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return f"{variable}: {path[0]!r} has no key {path[1]!r}: must be one of {', '.join(MappingEntry.model_fields)}."
    if error["type"] == "missing":
        return f'{variable}: {path[0]!r} lacks "{path[1]}": say which model it is, like {{"name": "owner/model"}}.'
    if len(path) == 1:
        return f'{variable}: {path[0]}: must be an object like {{"name": "owner/model"}}.'
    allowed = allowed_values(MappingEntry.model_fields[path[1]])
    wanted = f"must be one of {allowed}" if allowed else error["msg"]
    return f"{variable}: {path[0]}.{path[1]}: {wanted}."


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
