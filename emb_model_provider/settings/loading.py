"""Reads the settings from the process environment and from `.env`."""

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

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

_JSON_SETTINGS: Mapping[str, str] = {
    "model_mapping": '{"alias": {"name": "owner/model"}}',
    "fidelity_floors": '{"int8": 0.99}',
    "hub_names": '{"acme/model": {"modelscope": "other/model"}}',
}
"""Settings whose value is a JSON object, with an example of each."""

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
"""Variables of other tools that are read if the setting itself is unset."""

_USE_MODELSCOPE = {
    **dict.fromkeys(("true", "1", "yes", "on"), "modelscope"),
    **dict.fromkeys(("false", "0", "no", "off"), "huggingface"),
}
_JSON_ASSIGNMENT = re.compile(r"^[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*(?=[{\[])", re.MULTILINE)
_REST_OF_LINE = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\n|\Z)")


def load_settings(env_file: Path = Path(".env"), environ: Mapping[str, str] = os.environ) -> tuple[Settings, list[str]]:
    """Read the settings from `env_file` and from `environ`, which takes precedence.

    Also return warnings about names that look like settings but are unknown. A SettingsError has a message of one line.
    """
    variables = read_environment(env_file, environ)
    warnings = _unknown_names(variables)
    values = _collect_values(variables)
    try:
        return Settings.from_values(**values), warnings
    except ValidationError as error:
        raise SettingsError(_describe(error, values)) from None


def read_environment(env_file: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return every variable that has a value. An empty value means unset, in the file and in the environment."""
    variables = _read_env_file(env_file)
    variables.update(environ)
    return {name: value.strip() for name, value in variables.items() if value.strip()}


def _collect_values(variables: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for setting in Settings.variables():
        variable = setting.upper()
        for name in (PREFIX + variable, *OTHER_NAMES.get(variable, ())):
            if name in variables:
                values[setting] = _translate(name, variables[name])
                break
    for setting, example in _JSON_SETTINGS.items():
        if setting in values:
            values[setting] = _parse_object(PREFIX + setting.upper(), values[setting], example)
    return values


def _translate(name: str, value: str) -> str:
    """Translate the value of another tool's variable into a value of our setting."""
    if name == "USE_MODELSCOPE":
        if value.lower() not in _USE_MODELSCOPE:
            raise SettingsError(f"USE_MODELSCOPE={value}: must be true or false.")
        return _USE_MODELSCOPE[value.lower()]
    if name == "MODEL_HUB" and value.lower() not in ("modelscope", "huggingface"):
        raise SettingsError(f"MODEL_HUB={value}: must be modelscope or huggingface.")
    if name == "HF_HOME":
        return str(Path(value) / "hub")
    if name == "MODELSCOPE_DOMAIN" and "://" not in value:
        return f"https://{value}"
    return value


def _parse_object(variable: str, text: str, example: str) -> Any:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        duplicates = sorted({repr(key) for key in keys if keys.count(key) > 1})
        if duplicates:
            raise SettingsError(f"{variable} contains {', '.join(duplicates)} more than once: keep one.")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=without_duplicates)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{variable} is not valid JSON, {_position(error)}.") from None
    if not isinstance(value, dict):
        raise SettingsError(f"{variable}: must be a JSON object like {example}.")
    return value


def _unknown_names(variables: Mapping[str, str]) -> list[str]:
    known = [name.upper() for name in Settings.variables()]
    warnings = []
    for name in sorted(variables):
        setting = name.upper().removeprefix(PREFIX)
        if setting == name.upper() or name in (PREFIX + each for each in known):
            continue
        near = difflib.get_close_matches(setting, known, n=1)
        hint = f"did you mean {PREFIX}{near[0]}?" if near else "see docs/configuration.md."
        warnings.append(f"{name} is an unknown setting and is ignored: {hint}")
    return warnings


def _describe(error: ValidationError, values: Mapping[str, Any]) -> str:
    """Return one line about the first wrong value."""
    first = error.errors(include_url=False, include_input=False)[0]
    _, setting, *path = (str(part) for part in first["loc"])
    variable = PREFIX + setting.upper()
    if setting == "model_mapping":
        return _describe_mapping(variable, path, first)
    info = Settings.variables()[setting]
    shown = "(hidden)" if "SecretStr" in str(info.annotation) else values[setting]
    if setting in _JSON_SETTINGS:
        shown = json.dumps(shown)
    return f"{variable}={shown}: {_requirement(first, info)}."


def _describe_mapping(variable: str, path: list[str], error: ErrorDetails) -> str:
    example = '{"name": "owner/model"}'
    if error["type"] == "extra_forbidden":
        return f"{variable}: {path[0]!r} has no key {path[1]!r}: must be one of {', '.join(MappingEntry.model_fields)}."
    if error["type"] == "missing":
        return f'{variable}: {path[0]!r} lacks "{path[1]}": name the model, like {example}.'
    if len(path) == 1:
        return f"{variable}: {path[0]}: must be an object like {example}."
    return f"{variable}: {path[0]}.{path[1]}: {_requirement(error, MappingEntry.model_fields[path[1]])}."


def _requirement(error: ErrorDetails, info: FieldInfo) -> str:
    allowed = allowed_values(info)
    if not allowed or error["type"] == "value_error":  # the message of our own validator says more
        return error["msg"].removeprefix("Value error, ")
    is_list = ", " in allowed and " or " not in allowed
    return f"must be {'one of ' if is_list else ''}{allowed}"


def _read_env_file(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}): make it a readable UTF-8 text file.") from error
    rest, json_values = _extract_json_values(text.replace("\r\n", "\n"), path)
    plain = dotenv_values(stream=io.StringIO(rest), interpolate=False)
    return {**{name: value for name, value in plain.items() if value is not None}, **json_values}


def _extract_json_values(text: str, path: Path) -> tuple[str, dict[str, str]]:
    """Split unquoted JSON values off `text`, because dotenv parsers end a value at the first line break."""
    decoder = json.JSONDecoder()
    values: dict[str, str] = {}
    rest: list[str] = []
    position = 0
    while match := _JSON_ASSIGNMENT.search(text, position):
        name, start = match.group(1), match.end()
        try:
            _, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise SettingsError(f"{path}: {name} is not valid JSON, {_position(error)}.") from error
        trailing = _REST_OF_LINE.match(text, end)
        if trailing is None:
            line = text.count("\n", 0, end) + 1
            raise SettingsError(f"{path}: {name}: unexpected text after its JSON in line {line}: remove it.")
        rest.append(text[position : match.start()])
        values[name] = text[start:end]
        position = trailing.end()
    rest.append(text[position:])
    return "".join(rest), values


def _position(error: json.JSONDecodeError) -> str:
    return f"line {error.lineno} column {error.colno}: {error.msg}"
