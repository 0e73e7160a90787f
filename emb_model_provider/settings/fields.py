"""Types of setting values, and how a setting documents itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from emb_model_provider.model_spec import BackendName, Pooling, Precision, Source, TokenInput, Truncate

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

RemoteHubName = Literal["huggingface", "modelscope"]
FidelityPrecision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d+)?|mps)$"

_POOLING_ALIASES = {"last": "lasttoken", "last_token": "lasttoken", "weighted_mean": "weightedmean", "avg": "mean"}


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _split_commas(value: object) -> object:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _pooling_name(value: object) -> object:
    return _POOLING_ALIASES.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _expand_user(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # pydantic reports only ValueError as a validation error
        raise ValueError(f"{value}: ~ cannot be expanded, because this user has no home directory") from error


Lowered = BeforeValidator(_lower)
Uppered = BeforeValidator(_upper)
Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
Directory = Annotated[Path, BeforeValidator(_expand_user)]


class MappingEntry(BaseModel):
    """One model of MODEL_MAPPING. Keys that are left out take the value of the service-wide setting."""

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
    dimensions: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | Literal["any"] | None = None
    endpoint: str | None = None
    token: SecretStr | None = None
    cache_dir: Directory | None = None


def setting(default: Any, description: str, *, allowed: str = "", **constraints: Any) -> Any:
    """Declare a setting: a pydantic field whose description and allowed values are shown to users."""
    extra: dict[str, Any] | None = {"allowed": allowed} if allowed else None
    return Field(default=default, description=description, json_schema_extra=extra, **constraints)


def allowed_values(info: FieldInfo) -> str:
    """Return the allowed values of a setting as text, or an empty string if any text is allowed."""
    extra = info.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    if "bool" in str(info.annotation):
        return "true, false"
    return ", ".join(_literal_values(info.annotation))


def _literal_values(annotation: Any) -> list[str]:
    values = getattr(annotation, "__args__", ())
    if getattr(annotation, "__origin__", None) is Literal:
        return [str(value) for value in values]
    return [value for inner in values for value in _literal_values(inner)]
