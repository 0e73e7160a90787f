"""What `--json` says of models on disk: sizes are bytes, times datetimes (ISO 8601 in UTC when printed)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypedDict

from emb_model_provider.cli.console import ago, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from emb_model_provider.management.entries import CachedSnapshot, DerivedArtifact, Removal, Verification


class ArtifactInfo(TypedDict):
    """What was compiled from a model."""

    key: str
    precision: str
    computed: str
    size: int
    last_used: datetime
    fidelity: dict[str, Any] | None
    """`min_cosine`, `mean_cosine`, `texts`, `top10_overlap`, `spearman`."""
    in_use: bool


class ModelInfo(TypedDict):
    """A model on disk."""

    id: str
    model_name: str
    source: str
    revision: str | None
    asked_revision: str | None
    path: str | None
    state: str
    size: int
    """Of its files, and of what was compiled from them."""
    files_size: int
    artifacts: list[ArtifactInfo]
    fetched: datetime | None
    last_used: datetime | None
    in_use: bool


def model_info(entry: CachedSnapshot) -> ModelInfo:
    """Return what is known of a model, by the names that `GET /api/models/cache/list` has for it."""
    return {
        "id": entry.id,
        "model_name": entry.name,
        "source": entry.hub,
        "revision": entry.revision,
        "asked_revision": entry.asked_revision,
        "path": str(entry.path) if entry.path is not None else None,
        "state": entry.state,
        "size": size_on_disk(entry),
        "files_size": entry.size,
        "artifacts": [_artifact_info(artifact) for artifact in entry.artifacts],
        "fetched": entry.fetched,
        "last_used": entry.last_used,
        "in_use": entry.in_use,
    }


def _artifact_info(artifact: DerivedArtifact) -> ArtifactInfo:
    return {
        "key": artifact.key,
        "precision": artifact.precision,
        "computed": artifact.computed,
        "size": artifact.size,
        "last_used": artifact.last_used,
        "fidelity": asdict(artifact.fidelity) if artifact.fidelity is not None else None,
        "in_use": artifact.in_use,
    }


def size_on_disk(entry: CachedSnapshot) -> int:
    """Return the bytes of a model's files and of what was compiled from them."""
    return entry.size + sum(artifact.size for artifact in entry.artifacts)


def removal_info(removals: Iterable[Removal], *, dry_run: bool) -> dict[str, Any]:
    """Return `dry_run`, `models` (as they were), `artifacts` (keys), `freed` (bytes), `kept` (models with a `reason`)."""
    done = list(removals)
    return {
        "dry_run": dry_run,
        "models": [model_info(entry) for removal in done for entry in removal.snapshots],
        "artifacts": [key for removal in done for key in removal.artifacts],
        "freed": sum(removal.freed for removal in done),
        "kept": [
            {**model_info(entry), "reason": reason} for removal in done for entry, reason in removal.kept
        ],
        "unloaded": [],
    }


def verification_info(results: Iterable[Verification]) -> dict[str, Any]:
    """Return `ok`, and `models`, each with `ok`, `findings` (files and their problems), `damaged_artifacts` (keys)."""
    done = list(results)
    return {
        "ok": all(result.ok for result in done),
        "models": [
            {
                **model_info(result.snapshot),
                "ok": result.ok,
                "findings": [asdict(finding) for finding in result.findings],
                "damaged_artifacts": list(result.damaged_artifacts),
            }
            for result in done
        ],
    }


# --- for people -------------------------------------------------------------------------------------------


def precision_label(precision: str, computed: str) -> str:
    """Return the name that a compiled model goes by: weights that are kept whole are known by what they compute in."""
    return computed if precision == "fp32" else precision


def short_revision(revision: str | None) -> str:
    """Return a branch or tag as it is, and of a commit what tells it from others."""
    if revision is None:
        return "-"
    is_commit = len(revision) == 40 and all(char in "0123456789abcdef" for char in revision)
    return revision[:8] if is_commit else revision


def model_row(entry: CachedSnapshot) -> Sequence[str]:
    """Return a model's cells for `list`."""
    from emb_model_provider.compile.floors import shown_cosine

    artifacts = entry.artifacts
    labels = [precision_label(artifact.precision, artifact.computed) for artifact in artifacts]
    cosines = [shown_cosine(a.fidelity.min_cosine) if a.fidelity is not None else "-" for a in artifacts]
    return (
        entry.name,
        entry.hub,
        short_revision(entry.revision or entry.asked_revision),
        size(size_on_disk(entry)),
        ", ".join(labels) or "-",
        entry.state + (", in use" if entry.in_use else ""),
        ", ".join(cosines) or "-",
        ago(entry.last_used),
    )


MODEL_HEAD = ("ID", "SOURCE", "REVISION", "SIZE", "PRECISION", "STATE", "FIDELITY", "LAST USED")
