"""What the user's words may be, and how they are read: types of the fields, and one model of MODEL_MAPPING."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from emb_model_provider.model_spec import BackendName, Pooling, Precision, Source, TokenInput, Truncate

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

HubOfNames = Literal["huggingface", "modelscope"]
FlooredPrecision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d+)?|mps)$"


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _comma_separated(value: object) -> object:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _pooling_name(value: object) -> object:
    usual = {"last": "lasttoken", "last_token": "lasttoken", "weighted_mean": "weightedmean", "avg": "mean"}
    return usual.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _expanded(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # which is no mistake in pydantic's eyes
        raise ValueError(f"{value}: ~ leads to no home directory here") from error


Lowered = BeforeValidator(_lower)
Uppered = BeforeValidator(_upper)
Names = Annotated[tuple[str, ...], BeforeValidator(_comma_separated)]
Directory = Annotated[Path, BeforeValidator(_expanded)]


class MappingEntry(BaseModel):
    """One model of MODEL_MAPPING. What an entry leaves out is as the service's own settings say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    source: Annotated[Source, Lowered] | None = None
    precision: Annotated[Precision, Lowered] | None = None
    revision: str | None = None
    path: Directory | None = None
    device: Annotated[str, Lowered, Field(pattern=DEVICE_PATTERN)] | None = None
    backend: Annotated[BackendName, Lowered] | None = None
    pooling: Annotated[Pooling, BeforeValidator(_pooling_name)] | None = None
    normalize: bool | None = None
    max_length: Annotated[int, Field(ge=1)] | None = None
    trust_remote_code: bool | None = None
    prompts: dict[str, str] | None = None
    token_input: Annotated[TokenInput, Lowered] = "reject"
    truncate: Annotated[Truncate, Uppered] = "END"
    dimensions: (
        Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | Literal["any"] | None
    ) = None
    endpoint: str | None = None
    token: SecretStr | None = None
    cache_dir: Directory | None = None


def allowed_values(info: FieldInfo) -> str:
    """Return in words what a setting takes, or an empty string where any text will do."""
    extra = info.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    text = str(info.annotation)
    if "bool" in text:
        return "true, false"
    choices = _literal_values(info.annotation)
    return ", ".join(choices)


def _literal_values(annotation: Any) -> list[str]:
    values = getattr(annotation, "__args__", ())
    if getattr(annotation, "__origin__", None) is Literal:
        return [str(value) for value in values]
    return [value for inner in values for value in _literal_values(inner)]
