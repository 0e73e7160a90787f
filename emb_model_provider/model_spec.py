"""What to serve: one frozen record per model, made from the settings and read by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

HubName = Literal["huggingface", "modelscope", "local", "bundled"]
Source = Literal["auto", "huggingface", "modelscope", "local", "bundled"]
Precision = Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"]
BackendName = Literal["auto", "openvino", "torch"]
Pooling = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
TokenInput = Literal["reject", "model", "cl100k"]
Truncate = Literal["NONE", "START", "END"]

BUNDLED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
"""The commit of the official repository whose files are bundled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model to serve.

    `None` means "as the repository, the hub or the service's settings say". A value here is the
    operator's own word and wins over what the repository declares.
    """

    alias: str
    """The name that requests use."""
    name: str
    """A hub's repository id, or a directory."""
    source: Source = "auto"
    path: Path | None = None
    """A local directory that holds the model; wins over any hub."""
    revision: str | None = None
    """Branch, tag or commit; None is the hub's default branch."""

    endpoint: str | None = None
    """Base URL of the hub, where it is not the one in the settings."""
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    """Where the hub's client keeps downloads of this model."""
    trust_remote_code: bool | None = None

    precision: Precision = "auto"
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    backend: BackendName = "auto"

    pooling: Pooling | None = None
    normalize: bool | None = None
    max_length: int | None = None
    """Longest input in tokens, special tokens included."""
    prompts: Mapping[str, str] | None = None
    """Prompt name to the text put before each input, over those the repository declares."""
    dimensions: tuple[int, ...] | Literal["any"] | None = None
    """Sizes that requests may cut vectors to, beside those the model declares."""
    token_input: TokenInput = "reject"
    truncate: Truncate = "END"
    """What happens to an input that is too long when the request does not say."""
