"""Inspects a model on disk: what its files declare, and whether they are unchanged."""

from __future__ import annotations

import contextlib
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from emb_model_provider.backends.pipeline_plan import declared_values, plan_pipeline
from emb_model_provider.errors import LoadError
from emb_model_provider.management.types import CachedFile, Details, Finding, Verification
from emb_model_provider.progress import Progress
from emb_model_provider.snapshots import manifest, mirror
from emb_model_provider.snapshots.files import check_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from emb_model_provider.artifacts.manifest import ArtifactInfo
    from emb_model_provider.management.inventory import CacheEntry, Inventory
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.progress import CancelToken, OnProgress
    from emb_model_provider.snapshots.files import FileProblem
    from emb_model_provider.snapshots.snapshot import Snapshot

_LICENSE = re.compile(r"^license:[ \t]*(?:\n[ \t]*-[ \t]+)?[\"']?([^\"'#\n]+)", re.MULTILINE)


def describe(entry: CacheEntry, spec: ModelSpec, manifest_dir: Path, *, trust_remote_code: bool) -> Details:
    """Return what the files of a model, or its compiled form, declare."""
    values: dict[str, Any] = {**dict.fromkeys(Details.model_fields), "notes": [], "files": []}
    if not entry.manifests:
        return Details(**values)
    found = entry.manifests[0][1]
    snapshot = manifest.compose(found, manifest_dir)
    if snapshot.is_mirror:
        values["mirror_of"] = f"{snapshot.repository} ({snapshot.hub})"
        if not found.dependencies and (mirrored := mirror.read(snapshot.path)) is not None:  # it was never loaded
            snapshot = mirrored.snapshot
    compiled = [each for each in entry.artifacts if each.snapshot == snapshot.digest]
    if compiled:
        values |= _from_artifact(compiled[-1])
    else:
        values |= _from_files(spec, snapshot, trust_remote_code=trust_remote_code)
    values["files"] = [CachedFile(path=file.path, size=file.size, sha256=file.sha256) for file in snapshot.files]
    values["license"] = _license(snapshot.path)
    return Details(**values)


def verify(entry: CacheEntry, inventory: Inventory, on_progress: OnProgress, cancel: CancelToken) -> Verification:
    """Hash all files of a snapshot and of its artifacts. Wrong files are not used again before they are replaced."""
    everything = entry.state == "unverified"
    scan = partial(inventory.scan, everything=everything, directory=entry.directory)
    # Held, because a removal or an update would look like damage.
    with inventory.locks.hold(entry.path) if entry.path is not None else contextlib.nullcontext():
        entry = scan().entry_at(entry.location)
        findings = _check(entry, on_progress, cancel)
        wrong = [finding.path for finding in findings]
        if wrong:
            for key, found in entry.manifests:
                with contextlib.suppress(OSError):
                    manifest.invalidate(key, found, wrong, inventory.manifest_dir)
        damaged = [each.key for each in entry.artifacts if not inventory.store.verify(each.key)]
    if wrong:
        entry = scan().entry_at(entry.location)
    record = inventory.record_of(entry)
    ok = not findings and not damaged and record.state == "complete"
    return Verification(**dict(record), ok=ok, findings=findings, damaged_artifacts=damaged)


def _check(entry: CacheEntry, on_progress: OnProgress, cancel: CancelToken) -> list[Finding]:
    if entry.path is None:
        return []
    files = {file.path: file for _, found in entry.manifests for file in found.snapshot.files}

    def report(done: int, total: int) -> None:
        cancel.raise_if_cancelled()
        on_progress(Progress("verify", entry.name, done, total))

    if (directory := entry.directory) is not None and (mirrored := mirror.read(directory)) is not None:
        problems: Sequence[FileProblem] = mirror.check(mirrored, report)
    else:
        problems = check_files(entry.path, files.values(), on_bytes=report).problems
    return [Finding(path=each.path, problem=each.problem) for each in problems]


def _from_artifact(artifact: ArtifactInfo) -> dict[str, Any]:
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
    declared = declared_values(plan, snapshot)
    return {
        "dimensions": declared.dimensions,
        "max_tokens": declared.max_tokens,
        "pooling": declared.pooling,
        "normalized": declared.normalized,
        "prompts": dict(plan.prompts),
        "default_prompt": plan.default_prompt,
        "matryoshka": list(plan.matryoshka) if isinstance(plan.matryoshka, tuple) else plan.matryoshka,
        "notes": list(plan.notes),
    }


def _license(directory: Path) -> str | None:
    """Return the license, or the first of several, from the front matter of the README, such as `apache-2.0`."""
    try:
        text = (directory / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if not text.startswith("---"):
        return None
    found = _LICENSE.search(text[3:].partition("\n---")[0])
    return found[1].strip() if found else None
