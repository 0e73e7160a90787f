"""EMB_PROVIDER_* settings. (work in progress: groups first)"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """How to reach the hubs, where a model does not say otherwise."""

    cache_dir: Path
    """This package's own cache: manifests and artifacts."""
    modelscope_cache_dir: Path | None = None
    modelscope_endpoint: str | None = None
    modelscope_token: str | None = field(default=None, repr=False)
    hf_cache_dir: Path | None = None
    hf_endpoint: str | None = None
    hf_token: str | None = field(default=None, repr=False)
    fallback_to_huggingface: bool = False
    offline: bool = False
