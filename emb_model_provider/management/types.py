"""What is known of a model on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from emb_model_provider.backends.base import Fidelity, ModelDescription
    from emb_model_provider.model_spec import BackendName, HubName
    from emb_model_provider.snapshots.snapshot import Snapshot

Completeness = Literal["complete", "incomplete", "damaged", "unverified"]
"""complete: a manifest speaks for it, and its files are there at their sizes; incomplete: a fetch or a removal did not
come to its end; damaged: files of a manifest are missing or have another size; unverified: it lies in a hub's cache, and
no manifest of ours speaks for it (another program fetched it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedArtifact:
    """What was compiled from a snapshot."""

    key: str
    snapshot: str
    """The digest of the snapshot."""
    precision: str
    """How the weights are stored: fp32, fp16, int8 or int4."""
    computed: str
    """What it computes in: fp32, bf16, int8."""
    size: int
    """Bytes."""
    last_used: datetime
    fidelity: Fidelity | None
    in_use: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSnapshot:
    """A model's files on disk, at one revision, from one hub."""

    name: str
    """The repository's id on its hub, or a local directory's path."""
    hub: HubName
    endpoint: str | None
    asked_revision: str | None
    """Branch, tag or commit as it was asked for; None is the hub's default branch."""
    revision: str | None
    """Resolved; None where that is not known (an incomplete one)."""
    path: Path | None
    """The directory of its files, which is the hub's client's own; None where nothing is there yet."""
    state: Completeness
    size: int
    """Bytes of its own files, artifacts not counted."""
    fetched: datetime | None
    last_used: datetime | None
    digest: str | None
    artifacts: tuple[DerivedArtifact, ...]
    in_use: bool
    """Whether a process holds it: it is loaded, being loaded, or being fetched."""

    @property
    def id(self) -> str:
        """The name as one part of a path: `Qwen_Qwen3-0.6B` for `Qwen/Qwen3-0.6B`."""
        return cache_id(self.name)

    @property
    def owns_files(self) -> bool:
        """Whether removing it removes its files: those of a directory and of the bundled model are not ours."""
        return self.hub in ("huggingface", "modelscope")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFinding:
    """A file that is not as its manifest says."""

    path: str
    problem: Literal["missing", "size", "bytes", "unreadable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A snapshot whose bytes, and those of its artifacts, were all read again."""

    snapshot: CachedSnapshot
    findings: tuple[FileFinding, ...]
    damaged_artifacts: tuple[str, ...]
    """Keys."""

    @property
    def ok(self) -> bool:
        return not self.findings and not self.damaged_artifacts and self.snapshot.state == "complete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What was removed, or, of a dry run, what would be."""

    snapshots: Sequence[CachedSnapshot]
    artifacts: Sequence[str]
    """Keys."""
    freed: int
    """Bytes."""
    kept: Sequence[tuple[CachedSnapshot, str]] = ()
    """Of `remove_all` and `prune`: what is in use, with the reason."""


def cache_id(name: str) -> str:
    """Return a model's name as one part of a path, slashes as underscores."""
    return name.strip("/").replace("/", "_")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledModel:
    """A model that can be loaded within seconds."""

    snapshot: Snapshot
    backend: BackendName
    """`openvino` serves from an artifact that is there now; `torch` serves the snapshot itself."""
    size: int
    """Bytes on disk of what it is loaded from."""
    description: ModelDescription | None
    """What the artifact computes, with its fidelity; None with torch, which is measured when it is first loaded."""
    notes: tuple[str, ...]
    """Why it is not the backend that was expected; what concerns the precision stands in the description."""


class CachedModelInfo(TypedDict):
    """One line of `list_cached_models`."""

    model_name: str
    id: str
    source: str
    revision: str | None
    path: str | None
    size: int
    """Bytes, artifacts included."""
    state: str
    last_used: str | None
    """ISO 8601, UTC."""
    in_use: bool


def info_of(entry: CachedSnapshot) -> CachedModelInfo:
    """Return an entry as plain values, as `list_cached_models` gives them."""
    return {
        "model_name": entry.name,
        "id": entry.id,
        "source": entry.hub,
        "revision": entry.revision,
        "path": str(entry.path) if entry.path is not None else None,
        "size": entry.size + sum(artifact.size for artifact in entry.artifacts),
        "state": entry.state,
        "last_used": entry.last_used.isoformat() if entry.last_used is not None else None,
        "in_use": entry.in_use,
    }
