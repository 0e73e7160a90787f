"""Looking into a model on the disk: what its files say of it, and whether they are still what they were."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.errors import LoadError
from emb_model_provider.hubs.base import Progress
from emb_model_provider.management.types import FileFinding, Verification
from emb_model_provider.snapshots import manifest
from emb_model_provider.snapshots.snapshot import hash_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from emb_model_provider.artifacts.store import Stock, StockedArtifact
    from emb_model_provider.management.inventory import Inventory, Record
    from emb_model_provider.management.types import CachedSnapshot
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile

log = logging.getLogger(__name__)

_LICENSE = re.compile(r"^license:\s*[\"']?([^\"'#\n]+)", re.MULTILINE)


def details_of(record: Record, spec: ModelSpec, stock: Stock, *, trust_remote_code: bool) -> dict[str, Any]:
    """Return what is known of a model beside its entry, as plain JSON values; None is what its files do not say.

    `dimensions`, `max_tokens`, `pooling`, `normalized`, `prompts`, `default_prompt`, `matryoshka`, `notes`, `license`,
    `files` (path, size in bytes, sha256), `artifacts` (key, precision, computed, size, fidelity, in_use, last_used).
    """
    entry = record.entry
    details: dict[str, Any] = dict.fromkeys(
        (
            "dimensions",
            "max_tokens",
            "pooling",
            "normalized",
            "prompts",
            "default_prompt",
            "matryoshka",
            "license",
        )
    )
    details["notes"] = []
    details["files"] = []
    details["artifacts"] = [
        {
            **asdict(artifact),
            "last_used": artifact.last_used.isoformat(),
        }
        for artifact in entry.artifacts
    ]
    if not record.manifests:
        return details
    snapshot = record.manifests[0][1].snapshot
    details["files"] = [asdict(file) for file in snapshot.files]
    details["license"] = _license(snapshot.path)
    compiled = [each for each in stock.artifacts() if each.snapshot == snapshot.digest]
    if compiled:
        return details | _from_artifact(compiled[-1])
    return details | _from_files(spec, snapshot, trust_remote_code=trust_remote_code)


def verify(
    entry: CachedSnapshot, inventory: Inventory, on_progress: Callable[[Progress], None]
) -> Verification:
    """Read all bytes of a snapshot and of its artifacts again. What has other bytes is not trusted from then on.

    Raises: NotCachedError where it is gone.
    """
    # Held, so that nobody removes or replaces what is being read: that would look like damage.
    with inventory.holds.hold(entry.path) if entry.path is not None else contextlib.nullcontext():
        record = inventory.record_of(entry)
        findings = _findings(record, on_progress)
        wrong = [finding.path for finding in findings]
        if wrong:
            for question, found in record.manifests:
                with contextlib.suppress(OSError):
                    manifest.distrust(question, found, wrong, inventory.manifest_dir)
        damaged = [each.key for each in record.entry.artifacts if inventory.stock.damage(each.key)]
    now = next((each.entry for each in inventory.records() if each.is_same(record)), record.entry)
    return Verification(snapshot=now, findings=tuple(findings), damaged_artifacts=tuple(damaged))


def _findings(record: Record, on_progress: Callable[[Progress], None]) -> list[FileFinding]:
    entry = record.entry
    files = {file.path: file for _, found in record.manifests for file in found.snapshot.files}
    total = sum(file.size for file in files.values())
    findings: list[FileFinding] = []
    done = 0
    for file in files.values():
        if entry.path is not None and (finding := _finding(entry.path, file)) is not None:
            findings.append(finding)
        done += file.size
        on_progress(Progress("verify", entry.name, done, total))
    return findings


def _finding(directory: Path, file: SnapshotFile) -> FileFinding | None:
    path = directory / file.path
    try:
        if path.stat().st_size != file.size:
            return FileFinding(path=file.path, problem="size")
        if hash_file(path).sha256 != file.sha256:
            return FileFinding(path=file.path, problem="bytes")
    except FileNotFoundError:
        return FileFinding(path=file.path, problem="missing")
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error)
        return FileFinding(path=file.path, problem="unreadable")
    return None


def _from_artifact(artifact: StockedArtifact) -> dict[str, Any]:
    description = artifact.description
    return {
        "dimensions": description.get("dimension"),
        "max_tokens": description.get("max_length"),
        "pooling": description.get("pooling"),
        "normalized": description.get("normalize"),
        "prompts": description.get("prompts"),
        "default_prompt": description.get("default_prompt"),
        "matryoshka": description.get("matryoshka"),
        "notes": list(description.get("notes") or []),
    }


def _from_files(spec: ModelSpec, snapshot: Snapshot, *, trust_remote_code: bool) -> dict[str, Any]:
    try:
        plan = plan_pipeline(spec, snapshot, trust_remote_code=trust_remote_code)
    except (LoadError, OSError) as error:
        return {"notes": [str(error)]}
    modules = [_read(snapshot.path / place / "config.json") for place in _modules(snapshot.path)]
    config = _read(snapshot.path / "config.json")
    transformer = _read(snapshot.path / "sentence_bert_config.json")
    return {
        "dimensions": plan.truncate_dim or _dimensions(modules, config),
        "max_tokens": plan.max_length
        or transformer.get("max_seq_length")
        or config.get("max_position_embeddings"),
        "pooling": plan.pooling or _pooling(modules),
        "normalized": plan.normalize if plan.normalize is not None else _normalizes(snapshot.path),
        "prompts": dict(plan.prompts),
        "default_prompt": plan.default_prompt,
        "matryoshka": list(plan.matryoshka) if isinstance(plan.matryoshka, tuple) else plan.matryoshka,
        "notes": list(plan.notes),
    }


def _dimensions(modules: Sequence[dict[str, Any]], config: dict[str, Any]) -> int | None:
    """The width of what the last module gives that says so."""
    for module in reversed(modules):
        for name in ("out_features", "word_embedding_dimension", "embedding_dimension"):
            if isinstance(width := module.get(name), int):
                return width
    width = config.get("hidden_size") or config.get("dim") or config.get("d_model")
    return width if isinstance(width, int) else None


def _pooling(modules: Sequence[dict[str, Any]]) -> str | None:
    for module in modules:
        if isinstance(mode := module.get("pooling_mode"), str):
            return mode
        chosen = [
            name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for name, value in module.items()
            if name.startswith("pooling_mode_") and value is True
        ]
        if chosen:
            return "+".join(chosen)
    return None


def _modules(directory: Path) -> list[str]:
    return [str(each["path"]) for each in _listed(directory) if each.get("path")]


def _normalizes(directory: Path) -> bool | None:
    modules = _listed(directory)
    return str(modules[-1].get("type", "")).endswith("Normalize") if modules else None


def _listed(directory: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads((directory / "modules.json").read_bytes())
    except (OSError, ValueError):
        return []
    return [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _license(directory: Path) -> str | None:
    """What the front matter of the README says, such as `apache-2.0`."""
    try:
        text = (directory / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if not text.startswith("---"):
        return None
    found = _LICENSE.search(text[3:].partition("\n---")[0])
    return found[1].strip() if found else None
