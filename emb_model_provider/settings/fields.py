"""Types of setting values, and how a setting documents itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from emb_model_provider.model_spec import (
    BackendName,
    Kind,
    LongDocuments,
    Pooling,
    Precision,
    Source,
    TokenInput,
    Truncate,
    name_of_directory,
    parse_address,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic.fields import FieldInfo

RemoteHubName = Literal["huggingface", "modelscope"]
FidelityPrecision = Literal["fp32", "bf16", "fp16", "int8", "int4"]

CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")

_POOLING_ALIASES = {"last": "lasttoken", "last_token": "lasttoken", "weighted_mean": "weightedmean", "avg": "mean"}


def _text_converter(convert: Callable[[str], Any]) -> BeforeValidator:
    """Return a validator that converts text before pydantic checks it, and does not change other values."""
    return BeforeValidator(lambda value: convert(value) if isinstance(value, str) else value)


def _split_commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _clean_url(text: str) -> str:
    """Return a URL of a hub as its client needs it, which appends paths that begin with a slash."""
    url = text.strip().rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or any(map(str.isspace, url)):
        raise ValueError(f"must be a URL that begins with https:// or http://, like https://{url.rpartition('://')[2]}")
    return url


def _expand_user(text: str) -> Path:
    if CONTROL_CHARACTER.search(text):  # such as "D:\new" in JSON
        raise ValueError(r"the path contains a control character: in JSON, write \\ for a backslash")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # pydantic reports only ValueError as a validation error
        raise ValueError("~ cannot be expanded, because this user has no home directory") from error


@dataclass(frozen=True, slots=True)
class Allowed:
    """The allowed values of an annotated type, as documents and error messages show them."""

    text: str


Lowered = _text_converter(str.lower)
Uppered = _text_converter(str.upper)
Names = Annotated[tuple[str, ...], _text_converter(_split_commas)]
Directory = Annotated[Path, _text_converter(_expand_user), Allowed("a directory")]
Url = Annotated[str, _text_converter(_clean_url), Allowed("a URL that begins with https:// or http://")]
Device = Annotated[
    str, Lowered, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$"), Allowed("auto, cpu, cuda, cuda:N, mps")
]
Count = Annotated[int, Field(ge=1), Allowed("1 or more")]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False), Allowed("more than 0")]
NonNegativeNumber = Annotated[float, Field(ge=0, allow_inf_nan=False), Allowed("0 or more")]


class MappingEntry(BaseModel):
    """One model of MODEL_MAPPING. Keys that are left out take the value of the service-wide setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    source: Annotated[Source, Lowered] | None = None
    precision: Annotated[Precision, Lowered] | None = None
    revision: str | None = None
    path: Directory | None = None
    device: Device | None = None
    backend: Annotated[BackendName, Lowered] | None = None
    kind: Annotated[Kind, Lowered] | None = None
    pooling: (
        Annotated[Pooling, _text_converter(lambda text: _POOLING_ALIASES.get(text.lower(), text.lower()))] | None
    ) = None
    normalize: bool | None = None
    max_length: Count | None = None
    trust_remote_code: bool | None = None
    prompts: dict[str, str] | None = None
    token_input: Annotated[TokenInput, Lowered] = "auto"
    truncate: Annotated[Truncate | None, Uppered] = None
    raw_scores: bool = False
    long_documents: Annotated[LongDocuments, Lowered] = "windows"
    dimensions: Annotated[
        Annotated[tuple[Count, ...], Field(min_length=1)] | Literal["any"] | None, Allowed('a list of sizes, or "any"')
    ] = None
    endpoint: Url | None = None
    token: SecretStr | None = None
    cache_dir: Directory | None = None
    aliases: Names = ()
    input_type: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _take_name_of_path(cls, values: Any) -> Any:
        if isinstance(values, dict) and "name" not in values and isinstance(path := values.get("path"), str) and path:
            return {**values, "name": name_of_directory(_expand_user(path))}
        return values

    @model_validator(mode="before")
    @classmethod
    def _read_address(cls, values: Any) -> Any:
        address = (
            parse_address(values["name"]) if isinstance(values, dict) and isinstance(values.get("name"), str) else None
        )
        if address is None:
            return values
        found = {"name": address.name, "source": address.source, "revision": address.revision}
        for key in ("source", "revision"):
            if None not in (values.get(key), found[key]) and values[key] not in ("auto", found[key]):
                raise ValueError(f"{values['name']} contradicts {key} {values[key]!r}: remove one of the two")
        return {**values, **{key: value for key, value in found.items() if value is not None}}


def allowed_values(info: FieldInfo) -> str:
    """Return the allowed values of a setting as text, or an empty string if any text is allowed."""
    return ", ".join(_allowed_values(info.annotation, *info.metadata))


def _allowed_values(annotation: Any, *metadata: Any) -> list[str]:
    if texts := [item.text for item in metadata if isinstance(item, Allowed)]:
        return texts[-1:]  # the outermost annotation
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) is Annotated:
        return _allowed_values(*get_args(annotation))
    return [value for inner in get_args(annotation) for value in _allowed_values(inner)]
