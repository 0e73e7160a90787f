"""The models that the console suggests. `data/models.json` has their ids on both hubs and what they are for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from emb_model_provider.settings.fields import RemoteHubName

_FILE = Path(__file__).parent / "data" / "models.json"


SuggestedKind = Literal["dense", "reranker"]


class SuggestedModel(BaseModel):
    """A model that many users need."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    kind: SuggestedKind
    names: dict[RemoteHubName, str]
    """Its id on each hub that has it."""
    recommended: bool
    """Whether it has the badge: the first choice for its purpose."""
    bundled: bool = False
    """Whether it is installed with the service."""
    purpose: dict[Literal["en", "zh"], str]
    languages: dict[Literal["en", "zh"], str]
    dimensions: int | None = None
    """Of its vectors; None for a reranker."""
    max_tokens: int
    download_bytes: int
    """Approximately what is downloaded."""
    license: str

    @property
    def name(self) -> str:
        return next(iter(self.names.values()))


@cache
def suggested_models() -> list[SuggestedModel]:
    return TypeAdapter(list[SuggestedModel]).validate_json(_FILE.read_bytes())
