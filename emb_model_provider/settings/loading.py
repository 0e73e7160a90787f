"""Reads the settings from the process environment and from `.env`."""

from __future__ import annotations

import difflib
import io
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotenv.parser import parse_stream
from pydantic import ValidationError

from emb_model_provider.errors import SettingsError
from emb_model_provider.settings import PREFIX, MappingEntry, Settings, allowed_values
from emb_model_provider.settings.fields import CONTROL_CHARACTER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

_JSON_SETTINGS: Mapping[str, str] = {
    "model_mapping": '{"alias": {"name": "owner/model"}}',
    "fidelity_floors": '{"int8": 0.99}',
    "agreement_floors": '{"int8": 0.97}',
    "quotas": '{"search": 100000}',
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

_SERVICE_LINK = re.compile(
    rf"{PREFIX}(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)",
    re.ASCII,
)
_SERVICE_URL = re.compile(r"(?:tcp|udp|sctp)://", re.IGNORECASE)
_USE_MODELSCOPE = {
    **dict.fromkeys(("true", "1", "yes", "on"), "modelscope"),
    **dict.fromkeys(("false", "0", "no", "off"), "huggingface"),
}
_QUOTES = ('"', "'")
_SIMILAR_PREFIX = 0.9
"""Similarity from which the beginning of a name counts as a misspelled prefix: `EMB_PROVDER_` does, `LLM_PROVIDER_` not."""
_JSON_ASSIGNMENT = re.compile(r"^[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*(?=[{\[])", re.MULTILINE)
_REST_OF_LINE = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\n|\Z)")


def load_settings(env_file: Path = Path(".env"), environ: Mapping[str, str] = os.environ) -> tuple[Settings, list[str]]:
    """Read the settings from `env_file` and from `environ`, which takes precedence.

    Also return warnings about names that look like settings but are unknown.

    Raises:
        SettingsError: Values are wrong. Its message has one line for each of them.
    """
    variables = read_environment(env_file, environ)
    values, names, problems = _collect_values(variables)
    groups: dict[str, Any] = {}
    for group, kind in Settings.groups().items():
        own = {name: values[name] for name in kind.model_fields if name in values}
        try:
            groups[group] = kind(**own)
        except SettingsError as error:
            problems.append(str(error))
        except ValidationError as error:
            problems += _describe(error, own)
    if problems:
        raise SettingsError("\n".join(problems))
    origins = {
        setting: name if environ.get(name, "").strip() else f"{env_file}: {name}" for setting, name in names.items()
    }
    return Settings(**groups).with_origins(origins), _service_links(environ) + _unknown_names(variables)


def read_environment(env_file: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return every variable that has a value. An empty value means unset, in the file and in the environment."""
    variables = _read_env_file(env_file)
    for name, value in environ.items():
        if not _is_service_link(name, value):
            variables[name] = _unquote(name, value.strip())
    return {name: value.strip() for name, value in variables.items() if value.strip()}


def _is_service_link(name: str, value: str) -> bool:
    """Return whether Kubernetes or Docker set a variable for a service named `emb-provider` or `emb-provider-…`."""
    is_url = name.startswith(PREFIX) and name.endswith("_PORT") and _SERVICE_URL.match(value)
    return bool(is_url or _SERVICE_LINK.fullmatch(name))


def _service_links(environ: Mapping[str, str]) -> list[str]:
    """Return a warning for each setting whose variable is such a link."""
    return [
        f"{name}={value} is ignored: it is the address of a Kubernetes service, not a setting. To remove such variables, "
        "set enableServiceLinks: false in the specification of the pod."
        for name, value in environ.items()
        if name.removeprefix(PREFIX).lower() in Settings.variables() and _is_service_link(name, value)
    ]


def overridden_names(env_file: Path = Path(".env"), environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the settings in `env_file` whose value is not used, because the environment has another one."""
    in_file = read_environment(env_file, {})
    both = {name: value for name, value in in_file.items() if name in environ and _is_read(name)}
    used = read_environment(env_file, environ)
    return [name for name, value in both.items() if used.get(name) != value]


def _is_read(name: str) -> bool:
    return name.startswith(PREFIX) or any(name in names for names in OTHER_NAMES.values())


def _unquote(name: str, value: str) -> str:
    """Return the value of a variable of the environment without quotes, which `docker run --env-file` does not remove."""
    if not (_is_read(name) and len(value) > 1 and value[0] in _QUOTES and value[0] == value[-1]):
        return value
    if value[0] in value[1:-1]:
        raise SettingsError(f"{name}: its value begins and ends with a quote, and contains others: remove the quotes.")
    return value[1:-1]


def _collect_values(variables: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return the values of the settings, the variables that they come from, and what is wrong with others."""
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    problems: list[str] = []
    for setting in Settings.variables():
        variable = setting.upper()
        for name in (PREFIX + variable, *OTHER_NAMES.get(variable, ())):
            if name not in variables:
                continue
            try:
                values[setting] = _read_value(setting, name, variables[name])
            except SettingsError as error:
                problems.append(str(error))
            names[setting] = name
            break
    return values, names, problems


def _read_value(setting: str, name: str, text: str) -> Any:
    """Convert the text of a variable as far as that does not depend on the type of its setting."""
    if setting in _JSON_SETTINGS:
        return _parse_object(name, text, _JSON_SETTINGS[setting])
    if CONTROL_CHARACTER.search(text):
        raise SettingsError(
            f"{name}={_shown(setting, repr(text))}: contains a control character. In double quotes, \\n, \\t and the like "
            "are control characters in .env: write a path such as D:\\new without quotes, or in single quotes."
        )
    return _translate(name, text)


def _shown(setting: str, value: object) -> object:
    """Return a value as messages show it."""
    return "(hidden)" if "SecretStr" in str(Settings.variables()[setting].annotation) else value


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
        if name in (PREFIX + each for each in known):
            continue
        if name.upper().startswith(PREFIX):
            near = difflib.get_close_matches(name.upper().removeprefix(PREFIX), known, n=1)
        elif not (near := _behind_misspelled_prefix(name.upper(), known)):
            continue
        hint = f"did you mean {PREFIX}{near[0]}?" if near else "see docs/configuration.md."
        warnings.append(f"{name} is an unknown setting and is ignored: {hint}")
    return warnings


def _behind_misspelled_prefix(name: str, known: Sequence[str]) -> list[str]:
    """Return the setting that a name ends with, if the rest of the name is similar to the prefix."""
    return [
        each
        for each in known
        if name.endswith(each)
        and difflib.SequenceMatcher(None, name.removesuffix(each), PREFIX).ratio() >= _SIMILAR_PREFIX
    ]


def _describe(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """Return one line about each wrong value of a group."""
    lines: dict[tuple[str, ...], str] = {}
    for each in error.errors(include_url=False, include_input=False):
        setting, *path = (str(part) for part in each["loc"])
        variable = PREFIX + setting.upper()
        # The alternatives of a type have an error each, of which the first one is enough.
        if setting == "model_mapping":
            lines.setdefault((setting, *path[:2]), _describe_mapping(variable, path, each))
            continue
        shown = _shown(setting, json.dumps(values[setting]) if setting in _JSON_SETTINGS else values[setting])
        lines.setdefault((setting,), f"{variable}={shown}: {_requirement(each, Settings.variables()[setting])}.")
    return list(lines.values())


def _describe_mapping(variable: str, path: list[str], error: ErrorDetails) -> str:
    example = '{"name": "owner/model"}'
    if error["type"] == "extra_forbidden":
        return f"{variable}: {path[0]!r} has no key {path[1]!r}: must be one of {', '.join(MappingEntry.model_fields)}."
    if error["type"] == "missing":
        return f'{variable}: {path[0]!r} lacks "{path[1]}": name the model, like {example}.'
    if len(path) == 1 and error["type"] == "value_error":
        return f"{variable}: {path[0]}: {error['msg'].removeprefix('Value error, ')}."
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
    plain: dict[str, str] = {}
    for line in parse_stream(io.StringIO(rest)):
        if line.error:
            name = line.original.string.strip().partition("=")[0]  # the value may be a secret
            raise SettingsError(f'{path}: the line of {name[:40]} is not valid: write NAME=VALUE, or NAME="VALUE".')
        if line.key is not None and line.value is not None:
            plain[line.key] = line.value
    return {**plain, **json_values}


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
