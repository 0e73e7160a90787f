"""The names of the models on disk that can be served without a download, although the settings do not name them."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from emb_model_provider.errors import SettingsError
from emb_model_provider.hubs.caches import REMOTE_HUBS
from emb_model_provider.model_resolver import NameIndex, resolve_source
from emb_model_provider.settings import MappingEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from emb_model_provider.management.inventory import CacheEntry, CacheInfo, Inventory
    from emb_model_provider.model_spec import HubName, ModelSpec, Precision
    from emb_model_provider.settings import HubSettings, ModelSettings, Settings
    from emb_model_provider.snapshots.manifest import Manifest, ManifestKey
    from emb_model_provider.snapshots.snapshot import Snapshot

_SETTLED_NS = 50_000_000
"""Time stamps of directories are exact to several milliseconds: a later one could be the same."""

_Signature = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class ServableModel:
    """A complete model on disk."""

    spec: ModelSpec
    """Its alias is the id of the repository; of a further revision, `ID@REV`."""
    snapshot: Snapshot
    size: int
    """Bytes of its files and compiled forms."""
    fetched: int
    """Unix time in seconds."""
    is_dependency: bool
    """Whether another model on disk needs it, such as an adapter its base model, so that it need not be listed."""


@dataclass(frozen=True)
class CacheView:
    """The models on disk at one moment, by name."""

    models: Sequence[ServableModel]
    incomplete: Sequence[CacheEntry]
    """Downloads that are in progress or were interrupted."""
    _by_alias: dict[str, ServableModel] = field(init=False)
    _names: NameIndex = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_alias", {model.spec.alias: model for model in self.models})
        object.__setattr__(self, "_names", NameIndex(model.spec for model in self.models))

    def __contains__(self, alias: str) -> bool:
        return alias in self._by_alias

    def find(self, name: str) -> ServableModel | None:
        """Return the model that a name of a request refers to, like the names of served models."""
        found = self._names.find(name) or self._names.find_similar(name)
        return self._by_alias[found.alias] if found is not None else None

    def find_incomplete(self, name: str) -> CacheEntry | None:
        return next((entry for entry in self.incomplete if entry.name == name), None)


class CacheIndex:
    """Knows the models on disk, and reads the disk only if it has changed. Thread-safe."""

    def __init__(self, settings: Settings, inventory: Inventory) -> None:
        self._models = settings.models
        self._hubs = settings.hubs
        self._inventory = inventory
        self._lock = threading.Lock()
        self._view: CacheView | None = None
        self._signature: _Signature | None = None
        self._checked_at = float("-inf")

    def recent_view(self, max_age_s: float) -> CacheView | None:
        """Return the view if the disk was looked at so recently. Does not block."""
        return self._view if time.monotonic() - self._checked_at < max_age_s else None

    def view(self) -> CacheView:
        """Return the models on disk. Blocks."""
        with self._lock:
            signature = self._read_signature()
            if self._view is None or signature is None or signature != self._signature:
                self._view, self._signature = self._build(self._inventory.scan()), signature
            self._checked_at = time.monotonic()
            return self._view

    def _read_signature(self) -> _Signature | None:
        """Return what changes when a model is downloaded, removed or compiled; None if it has just changed."""
        root = self._inventory.manifest_dir
        found = []
        for path in (*(root / hub for hub in (*REMOTE_HUBS, "bundled")), self._hubs.cache_dir / "artifacts"):
            with suppress(OSError):
                found.append((str(path), path.stat().st_mtime_ns))
        latest = max((modified for _, modified in found), default=0)
        return tuple(found) if time.time_ns() - latest > _SETTLED_NS else None

    def _build(self, info: CacheInfo) -> CacheView:
        dependencies = {
            (key.hub, key.repository)
            for entry in info.entries
            for _, found in entry.manifests
            for key in found.dependencies.values()
        }
        chosen: dict[str, ServableModel] = {}
        # The hub that a name without a hub means takes precedence.
        for model in sorted(self._servable(info.entries, dependencies), key=self._is_from_other_hub):
            chosen.setdefault(model.spec.alias, model)
        models = sorted(chosen.values(), key=lambda model: model.spec.alias.lower())
        return CacheView(models, [entry for entry in info.entries if entry.state == "incomplete"])

    def _is_from_other_hub(self, model: ServableModel) -> bool:
        return resolve_source(replace(model.spec, source=self._models.model_source)) != model.spec.source

    def _servable(
        self, entries: Iterable[CacheEntry], dependencies: set[tuple[HubName, str]]
    ) -> Iterator[ServableModel]:
        by_name: dict[tuple[HubName, str], list[tuple[ManifestKey, Manifest, CacheEntry]]] = {}
        for entry in entries:
            if entry.state == "complete" and entry.hub != "local":
                for key, found in entry.manifests:
                    if not key.patterns and not found.is_outdated:
                        by_name.setdefault((entry.hub, entry.name), []).append((key, found, entry))
        for (hub, repository), copies in by_name.items():
            name = _requested_name(hub, repository, self._hubs)
            copies.sort(key=lambda copy: (copy[0].revision is not None, -(copy[1].fetched or 0)))
            for index, (key, found, entry) in enumerate(copies):
                alias = name if index == 0 else f"{name}@{key.revision}"
                requested = MappingEntry(name=name, source=hub, revision=key.revision)
                yield ServableModel(
                    spec=_spec(self._models, alias, requested, _compiled_precision(entry)),
                    snapshot=found.snapshot,
                    size=entry.size,
                    fetched=int(found.fetched or 0),
                    is_dependency=(hub, repository) in dependencies,
                )


def _spec(models: ModelSettings, alias: str, entry: MappingEntry, precision: Precision | None) -> ModelSpec:
    """Return the model with the defaults of the settings; at `precision` if these leave it open and allow it."""
    spec = models.spec_for(alias, entry)
    if precision is not None and spec.precision == "auto":
        with suppress(SettingsError):
            spec = models.spec_for(alias, entry.model_copy(update={"precision": precision}))
    # Only the settings decide whose code may run, because anybody who may embed texts can name a model on disk.
    return replace(spec, trust_remote_code=False)


def _compiled_precision(entry: CacheEntry) -> Precision | None:
    """Return the precision at which a model was pulled, if it is not the one that `auto` would compile."""
    artifacts = sorted(entry.artifacts, key=lambda artifact: artifact.last_used)
    if not artifacts or any(artifact.weights == "fp32" for artifact in artifacts):
        return None
    return artifacts[-1].weights  # type: ignore[return-value]  # its manifest is valid


def _requested_name(hub: str, repository: str, hubs: HubSettings) -> str:
    """Return the name for which the settings request a repository from its hub."""
    return next((name for name in hubs.hub_names if hubs.name_on(hub, name) == repository), repository)
