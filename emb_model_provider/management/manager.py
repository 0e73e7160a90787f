"""The model manager, through which the service, the command line, REST and Python programs use models on disk."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emb_model_provider.errors import (
    CorruptSnapshotError,
    HubError,
    ModelInUseError,
    NotAllowedError,
    NotCachedError,
    UnsupportedPrecisionError,
)
from emb_model_provider.hubs.caches import REMOTE_HUBS
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.management.cache_index import CacheIndex
from emb_model_provider.management.inspection import describe, verify
from emb_model_provider.management.inventory import Inventory
from emb_model_provider.management.removal import Remover
from emb_model_provider.management.types import CompiledModel, Finding, Verification
from emb_model_provider.model_resolver import PATHS, directory_of, resolve_model, resolve_source
from emb_model_provider.model_spec import MIRROR_MANIFEST
from emb_model_provider.progress import CancelToken, OnProgress, OnWork, Progress, ignore_progress, measure_work
from emb_model_provider.settings.loading import load_settings
from emb_model_provider.snapshots import manifest, mirror
from emb_model_provider.snapshots.files import has_sizes, size_of, use_temporary_directory, walk
from emb_model_provider.snapshots.locks import FileLock
from emb_model_provider.snapshots.manifest import FilePatterns
from emb_model_provider.snapshots.snapshot import parts_of

if TYPE_CHECKING:
    import builtins
    from collections.abc import Collection, Sequence

    from sentence_transformers import SentenceTransformer

    from emb_model_provider.artifacts.prepare import BackendPreparer
    from emb_model_provider.management.inventory import CacheEntry, CacheInfo
    from emb_model_provider.management.types import CachedModelRecord, Details, Removal
    from emb_model_provider.model_spec import ModelSpec, Precision, Source
    from emb_model_provider.settings import Settings
    from emb_model_provider.snapshots.mirror import Mirror, MirrorChanges
    from emb_model_provider.snapshots.snapshot import Snapshot

_TRIES = 5
"""How often a snapshot is downloaded that another process removes each time before it can be locked."""


class ModelManager:
    """Models on disk, across hubs. Safe to use from several threads and processes."""

    def __init__(self, settings: Settings, *, source: Source | None = None, on_work: OnWork = lambda _: None) -> None:
        """Create a manager.

        Args:
            settings: Where the hubs and the caches are.
            source: Hub of models for which neither the caller nor the settings name one.
            on_work: Called after each download and each compilation.
        """
        use_temporary_directory(settings.hubs.cache_dir)
        self._settings = settings
        self._source = source
        self._on_work = on_work
        self._inventory = Inventory(settings)
        self._remover = Remover(self._inventory)
        self._held: weakref.WeakKeyDictionary[SentenceTransformer, weakref.finalize[..., SentenceTransformer]] = (
            weakref.WeakKeyDictionary()
        )
        """The models of `load_model_and_tokenizer`, with what releases their files."""

    @cached_property
    def index(self) -> CacheIndex:
        """The names of the models on disk that can be served."""
        return CacheIndex(self._settings, self._inventory)

    # --- downloading and compiling --------------------------------------------------------------------

    @cached_property
    def preparer(self) -> BackendPreparer:
        """Prepares backends from snapshots."""
        from emb_model_provider.artifacts.prepare import BackendPreparer  # not needed to list models

        settings = self._settings
        return BackendPreparer(settings.hubs, settings.fidelity, settings.trust, on_work=self._on_work)

    def ensure(
        self,
        spec: ModelSpec,
        *,
        force: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        offline: bool = False,
        on_progress: OnProgress = ignore_progress,
        cancel: CancelToken | None = None,
    ) -> Snapshot:
        """Return the complete, verified snapshot of a model and its dependencies, downloading it if necessary. Blocks.

        Args:
            spec: The model.
            force: Ask the hub even if the model is on disk, and download what changed.
            include: Patterns (fnmatch) of the files to download, among those that serving needs.
            exclude: Patterns of files not to download.
            offline: Ask no hub, as with OFFLINE.
            on_progress: Called with the progress of the download.
            cancel: Ends the download.

        Raises:
            HubError: The message says what to do.
            UnsupportedModelError: It is an adapter whose base model cannot be used.
            ModelInUseError: A newer state of a branch would replace files that a process uses.
            OperationCancelledError: `cancel` was cancelled.
        """
        hubs = self._settings.hubs
        with measure_work("download", spec.name, on_progress, self._on_work) as report:
            return fetch_snapshot(
                spec,
                hubs.model_copy(update={"offline": True}) if offline else hubs,
                report,
                cancel=cancel,
                force=force,
                patterns=FilePatterns(tuple(include), tuple(exclude)),
                trust=self._settings.trust,
            )

    def acquire(
        self,
        spec: ModelSpec,
        *,
        offline: bool = False,
        on_progress: OnProgress = ignore_progress,
        cancel: CancelToken | None = None,
    ) -> tuple[Snapshot, FileLock]:
        """Return the snapshot of a model, downloading it if necessary, with a lock that keeps it on disk.

        Until the lock is released or the process ends, no process removes the snapshot or its dependencies. Blocks.

        Args:
            spec: The model.
            offline: Ask no hub, as with OFFLINE.
            on_progress: Called with the progress of the download.
            cancel: Ends the download.

        Raises:
            HubError: The message says what to do.
            UnsupportedModelError: It is an adapter whose base model cannot be used.
            OperationCancelledError: `cancel` was cancelled.
        """
        held: dict[Path, FileLock] = {}
        for _ in range(_TRIES):
            snapshot = self.ensure(spec, offline=offline, on_progress=on_progress, cancel=cancel)
            parts = list(parts_of(snapshot))
            # The locks of an earlier try are kept while it is downloaded again.
            held = {part.path: held.get(part.path) or self._inventory.locks.hold(part.path) for part in parts}
            if self._is_current_mirror(snapshot) if snapshot.is_mirror else all(map(self._is_current, parts)):
                return snapshot, FileLock(partial(_release_all, list(held.values())))
            # Removed or replaced before it was locked.
        raise HubError(
            f"{spec.name} was removed or replaced each time before it could be loaded. Make sure that nothing else "
            "changes the cache meanwhile (`emb-provider rm`, `pull --force`, another tool), then try again."
        )

    def hold(self, snapshot: Snapshot) -> FileLock:
        """Return a lock that keeps a snapshot on disk, as `acquire` does. Blocks.

        Raises:
            HubError: It was removed or replaced.
        """
        parts = {part.path for part in parts_of(snapshot)}
        lock = FileLock(partial(_release_all, [self._inventory.locks.hold(path) for path in parts]))
        if self._is_current_mirror(snapshot) if snapshot.is_mirror else all(map(self._is_current, parts_of(snapshot))):
            return lock
        lock.release()
        raise HubError(f"{snapshot.repository} was removed or replaced.")

    def _is_current_mirror(self, snapshot: Snapshot) -> bool:
        """Return whether a mirror was not replaced by a newer one before it was locked."""
        found = mirror.read(snapshot.path)
        files = {part.path: part.files for part in parts_of(found.snapshot)} if found is not None else {}
        return all(
            files.get(part.path) == part.files and has_sizes(part.path, part.files) for part in parts_of(snapshot)
        )

    def _is_current(self, snapshot: Snapshot) -> bool:
        """Return whether the files of a snapshot are unchanged since the time before it was locked."""
        if not has_sizes(snapshot.path, snapshot.files):
            return False
        if snapshot.hub != "modelscope":
            return True
        # A branch keeps its directory there. A process that replaces its files removes the manifest first.
        digest = snapshot.with_dependencies({}).digest
        return any(
            (found.snapshot.path, found.snapshot.digest) == (snapshot.path, digest)
            for _, found in manifest.load_all(self._inventory.manifest_dir)
        )

    def compile(
        self, spec: ModelSpec, *, on_progress: OnProgress = ignore_progress, cancel: CancelToken | None = None
    ) -> CompiledModel:
        """Prepare a model so that it can be loaded within seconds, downloading and compiling it if necessary. Blocks.

        Args:
            spec: The model.
            on_progress: Called with the progress of the download, then with the phases `compile` and `compare`.
            cancel: Ends the download or the compiler.

        Raises:
            HubError: It cannot be downloaded.
            LoadError: No backend can serve it, or its accuracy is below the floor.
            OperationCancelledError: `cancel` was cancelled.
        """
        snapshot, lock = self.acquire(spec, on_progress=on_progress, cancel=cancel)
        with lock:
            prepared = self.preparer.prepare(spec, snapshot, on_progress=on_progress, cancel=cancel)
        return CompiledModel(
            snapshot=snapshot,
            backend=prepared.backend,
            size=prepared.size,
            description=prepared.description,
            notes=prepared.notes,
        )

    def mirror(
        self,
        spec: ModelSpec,
        directory: Path,
        *,
        force: bool = False,
        on_progress: OnProgress = ignore_progress,
        cancel: CancelToken | None = None,
    ) -> tuple[Mirror, MirrorChanges]:
        """Make a directory a mirror of a model, downloading the model if necessary. Blocks.

        The directory contains everything that serving needs, and can be copied to a machine without a hub.

        Args:
            spec: The model.
            directory: A directory that does not exist or is empty, or an earlier mirror of the same repository, of which
                only what has changed is replaced.
            force: Ask the hub even if the model is on disk, and download what changed.
            on_progress: Called with the progress of the download, then of the copy with the phase `verify`.
            cancel: Ends the download or the copy.

        Returns:
            What the manifest of the mirror says, and what was changed in the directory.

        Raises:
            HubError: It cannot be downloaded, or the directory is not writable.
            NotAllowedError: The directory contains something else.
            ModelInUseError: A process on this machine has loaded the mirror.
            OperationCancelledError: `cancel` was cancelled. To continue, call it again.
        """
        if force:
            self.ensure(spec, force=True, on_progress=on_progress, cancel=cancel)
        snapshot, lock = self.acquire(spec, on_progress=on_progress, cancel=cancel)
        with lock:
            changes = self._copy(spec, snapshot, directory, on_progress, cancel)
        mirrored = mirror.read(directory.expanduser().absolute())
        if mirrored is None:
            raise HubError(f"Another program has removed the mirror {directory}. Run the same command again.")
        return mirrored, changes

    def copy_to(
        self, spec: ModelSpec, snapshot: Snapshot, directory: Path, *, on_progress: OnProgress = ignore_progress
    ) -> Path:
        """Make a directory a mirror of a snapshot that `ensure` returned for a model, or of the chosen files of one.

        Returns:
            The directory, as an absolute path.

        Raises:
            HubError: The directory is not writable, or the snapshot has changed.
            NotAllowedError: The directory contains something else.
            ModelInUseError: A process on this machine has loaded the mirror.
        """
        with ExitStack() as held:
            for path in sorted(snapshot.directories):
                held.enter_context(self._inventory.locks.hold(path))
            self._copy(spec, snapshot, directory, on_progress)
        return directory.expanduser().absolute()

    def _copy(
        self,
        spec: ModelSpec,
        snapshot: Snapshot,
        directory: Path,
        on_progress: OnProgress,
        cancel: CancelToken | None = None,
    ) -> MirrorChanges:
        """Write a mirror. The snapshot is locked."""
        directory = directory.expanduser().absolute()
        real = directory.resolve()
        for part in parts_of(snapshot):
            if part.path.resolve() in (real, *real.parents):
                raise NotAllowedError(
                    f"{directory} is in the directory of {snapshot.repository} itself ({part.path}). Choose another directory."
                )
        is_named = snapshot.hub != "local" or spec.path is not None
        name = spec.name if is_named else snapshot.path.name
        token = cancel or CancelToken()

        def report(done: int, total: int) -> None:
            on_progress(Progress("verify", snapshot.repository, done, total))
            token.raise_if_cancelled()

        lock = self._inventory.locks.try_lock(directory)
        if lock is None:
            raise ModelInUseError(
                f"{directory} is in use: a process has loaded it, or writes it. Nothing was changed. Unload the model first "
                "(`emb-provider unload`), or end the process."
            )
        with lock:
            return mirror.write(snapshot, directory, name, report)

    # --- listing --------------------------------------------------------------------------------------

    def list(self, *, everything: bool = False) -> list[CachedModelRecord]:
        """Return the models on disk, by name.

        Args:
            everything: Include models that other programs left in the hubs' caches.
        """
        return [self._inventory.record_of(entry) for entry in self._inventory.scan(everything=everything).entries]

    def find(
        self,
        name: str,
        *,
        source: Source | None = None,
        revision: str | None = None,
        directories: bool = False,
        removing: bool = False,
    ) -> builtins.list[CachedModelRecord]:
        """Return the models on disk that a name refers to.

        Args:
            name: A repository id under any of its hubs' names, a directory, an alias of the settings, an `id`, or the
                last part of a name that only one model has.
            source: Only models from this hub.
            revision: Only this revision, as it was requested or as it was resolved.
            directories: Also read a directory from which no model was loaded yet, if it is a mirror. Not for names from
                clients of the service, which may not name directories.
            removing: The models are going to be removed, so that an error does not say how to download them.

        Raises:
            NotCachedError: There is none; the message names models that exist.
            CorruptSnapshotError: The directory is an incomplete mirror, or its manifest is invalid.
            AmbiguousNameError: An `id` is that of several models.
        """
        is_allowed = directories and source in (None, "auto", "local")
        directory = directory_of(name) if is_allowed else None
        info = self._inventory.scan(directory=directory)
        try:
            found = self._inventory.find(info, name, source, revision, removing=removing)
        except NotCachedError:
            if directory is None:
                raise
            raise NotCachedError(
                f"{name} is a directory without {MIRROR_MANIFEST}: it is not a mirror, or it was copied incompletely, and no "
                f"model was loaded from it on this machine. Copy it again with {MIRROR_MANIFEST}, or load it as it is: "
                f"`emb-provider pull {name}`."
            ) from None
        return [self._inventory.record_of(entry) for entry in found]

    def inspect(self, model: CachedModelRecord) -> Details:
        """Return what the files of a model, or its compiled form, declare.

        Raises:
            NotCachedError: It is no longer on disk.
        """
        entry = self._entry(model)
        spec = resolve_model(self._settings, entry.name, source=entry.hub)
        spec = replace(spec, path=Path(entry.name) if entry.hub == "local" else None)
        hub = entry.manifests[0][1].snapshot.hub if entry.manifests else entry.hub
        trusted = self._settings.trust.allows(spec, hub)
        return describe(entry, spec, self._inventory.manifest_dir, trust_remote_code=trusted)

    def verify(
        self, model: CachedModelRecord, *, on_progress: OnProgress = ignore_progress, cancel: CancelToken | None = None
    ) -> Verification:
        """Hash all files of a model and of its compiled forms. Blocks.

        Wrong files are downloaded again, and wrong artifacts compiled again, when they are next needed.

        Raises:
            NotCachedError: It is no longer on disk.
            OperationCancelledError: `cancel` was cancelled.
        """
        try:
            return verify(self._entry(model), self._inventory, on_progress, cancel or CancelToken())
        except CorruptSnapshotError:  # a mirror whose manifest was replaced by something else
            finding = Finding(path=MIRROR_MANIFEST, problem="bytes")
            return Verification(**dict(model), ok=False, findings=[finding], damaged_artifacts=[])

    def repair(
        self, verification: Verification, *, on_progress: OnProgress = ignore_progress
    ) -> tuple[Verification, builtins.list[str]]:
        """Download the wrong files of a verified model again, and remove its damaged artifacts.

        Returns:
            A new verification, and notes on what was done and what was not repaired.

        Raises:
            HubError: The files cannot be downloaded.
            NotCachedError: The model is no longer on disk.
        """
        entry = self._entry(verification)
        name = entry.name
        if verification.findings and not entry.owns_files:
            if entry.directory is not None and mirror.is_mirror(entry.directory):
                return verification, [f"{name}: mirrors are not repaired. Copy it again, or run emb-provider mirror"]
            return verification, [
                f"{name}: its files are your own and are not repaired. Restore them, or remove the model (rm)"
            ]
        if verification.findings or entry.state != "complete":
            spec = resolve_model(self._settings, name, source=entry.hub, revision=entry.asked_revision)
            self.ensure(replace(spec, endpoint=entry.endpoint or spec.endpoint), force=True, on_progress=on_progress)
        notes = [self._remove_damaged(name, key) for key in verification.damaged_artifacts]
        # A branch that has moved has another directory now.
        present = [each for each in self._inventory.scan().entries if set(entry.keys[:1]) & set(each.keys)]
        return verify(present[0] if present else entry, self._inventory, on_progress, CancelToken()), notes

    def _remove_damaged(self, name: str, key: str) -> str:
        lock = self._inventory.store.try_lock(key)
        if lock is None:
            return f"{name}: a process serves its damaged compiled form: emb-provider unload {name}"
        with lock:
            self._inventory.store.remove(key)
        return (
            f"{name}: its damaged compiled form was removed. The next start compiles it again; to do it now: "
            f"emb-provider pull {name}"
        )

    @staticmethod
    def total_size(models: Sequence[CachedModelRecord]) -> int:
        """Return the bytes that models take on disk together: a file or compiled form that several have counts once."""
        artifacts = {artifact.key: artifact.size for model in models for artifact in model.artifacts}
        # A directory of a user can contain other files. Those of one hub's cache can be links to the same file.
        in_caches = {Path(model.path) for model in models if model.path is not None and model.source in REMOTE_HUBS}
        others = {
            (model.path, model.model_name): model.files_size
            for model in models
            if model.path is None or (model.source not in REMOTE_HUBS and Path(model.path) not in in_caches)
        }
        files = {path for directory in in_caches for path in walk(directory)}
        return size_of(files) + sum(artifacts.values()) + sum(others.values())

    # --- removing -------------------------------------------------------------------------------------

    def remove(
        self,
        name: str,
        *,
        source: Source | None = None,
        revision: str | None = None,
        wait_s: float = 0.0,
        dry_run: bool = False,
        released: Collection[Path | None] = (),
    ) -> Removal:
        """Remove the models that a name refers to: files, manifests, and everything derived from them, or nothing.

        The files of a directory and of the bundled model are kept; what was derived from them is removed.

        Args:
            name: As for `find`.
            source: Only models from this hub.
            revision: Only this revision.
            wait_s: How many seconds to wait for a model that is in use.
            dry_run: Remove nothing, and return what would be removed.
            released: Of a dry run, directories that their users will release before the removal.

        Raises:
            NotCachedError: The model is not on disk.
            ModelInUseError: A model is in use for longer than `wait_s`.
            ManagementError: Files cannot be removed.
        """
        return self.remove_together(
            [(name, revision)], source=source, wait_s=wait_s, dry_run=dry_run, released=released
        )

    def remove_together(
        self,
        names: Sequence[tuple[str, str | None]],
        *,
        source: Source | None = None,
        wait_s: float = 0.0,
        dry_run: bool = False,
        released: Collection[Path | None] = (),
    ) -> Removal:
        """Remove the models that names with their revisions refer to, or none of them. See `remove`."""

        def find(info: CacheInfo) -> builtins.list[CacheEntry]:
            found = [
                entry
                for name, revision in names
                for entry in self._inventory.find(info, name, source, revision, removing=True)
            ]
            return [*{entry.location: entry for entry in found}.values()]

        return self._remover.remove(find, wait_s=wait_s, dry_run=dry_run, released=released)

    def remove_all(
        self, *, wait_s: float = 0.0, dry_run: bool = False, released: Collection[Path | None] = ()
    ) -> Removal:
        """Remove every model that this package put into the cache directories of the settings.

        Models that are in use, or in other directories, are kept, with the reason.

        Args:
            wait_s: How many seconds to wait for models that are in use.
            dry_run: Remove nothing, and return what would be removed.
            released: Of a dry run, directories that their users will release before the removal.
        """
        return self._remover.remove_all(wait_s=wait_s, dry_run=dry_run, released=released)

    def prune(self, *, dry_run: bool = False) -> Removal:
        """Remove leftovers: interrupted downloads and removals, and compiled forms whose model no longer exists.

        Args:
            dry_run: Remove nothing, and return what would be removed.

        Raises:
            ManagementError: The cache directory is not writable.
        """
        return self._remover.prune(dry_run=dry_run)

    # --- for Python programs --------------------------------------------------------------------------

    def ensure_model_cached(
        self,
        name: str,
        *,
        source: Source | None = None,
        revision: str | None = None,
        force: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        local_dir: Path | str | None = None,
    ) -> Path:
        """Return the directory of a model's files, downloading them if necessary.

        Args:
            name: A repository id, an alias of the settings, or a directory.
            source: The hub; None: as configured.
            revision: Branch, tag or commit; None: as configured, else the default branch.
            force: Ask the hub even if the model is on disk, and download what changed.
            include: Patterns (fnmatch) of the files to download, among those that serving needs.
            exclude: Patterns of files not to download.
            local_dir: Directory to copy the files to, which becomes a mirror (see `mirror`).

        Raises:
            HubError: The message says what to do.
            NotAllowedError: `local_dir` contains something else.
        """
        spec = self._spec(name, source=source, revision=revision)
        snapshot = self.ensure(spec, force=force, include=include, exclude=exclude)
        return snapshot.path if local_dir is None else self.copy_to(spec, snapshot, Path(local_dir))

    def list_cached_models(self) -> builtins.list[dict[str, Any]]:
        """Return the models on disk as dictionaries, with the fields of `GET /api/models/cache/list`."""
        return [model.model_dump(mode="json") for model in self.list()]

    def evict_model(self, name: str, *, wait_s: float = 0.0) -> Removal:
        """Remove a model from disk; a manager that was created for one hub removes it from that hub only.

        Raises:
            NotCachedError, ModelInUseError, ManagementError: As for `remove`.
        """
        source = resolve_source(self._spec(name)) if self._source is not None else None
        return self.remove(name, source=source, wait_s=wait_s)

    def load_model_and_tokenizer(
        self, name: str, *, precision: Precision | None = None, device: str | None = None
    ) -> tuple[SentenceTransformer, Any]:
        """Return a model as a SentenceTransformer, and its tokenizer.

        It is the pipeline that compiled models are compared with: a ModelScope repository without `modules.json` has
        the pooling that its configuration declares. Its files stay on disk until `release`, or until the model is
        garbage-collected.

        Args:
            name: A repository id, an alias of the settings, or a directory.
            precision: fp32 (default), fp16, bf16 or auto.
            device: auto, cpu, cuda, cuda:N or mps; None: as configured.

        Raises:
            HubError: It cannot be downloaded.
            LoadError: It cannot be loaded.
            UnsupportedPrecisionError: The precision is int8 or int4.
            ImportError: torch is not installed.
        """
        spec = self._spec(name)
        if device is not None:
            spec = replace(spec, device=device)
        if precision in ("int8", "int4"):
            raise UnsupportedPrecisionError(
                f"Precision {precision} is not available here: choose fp32, fp16, bf16 or auto. `Embedder` and the "
                "service support it."
            )
        from emb_model_provider.backends.pytorch.pipeline import load_sentence_transformer

        snapshot, lock = self.acquire(spec)
        try:
            trusted = self._settings.trust.allows(spec, snapshot.hub)
            model = load_sentence_transformer(spec, snapshot, precision or "fp32", trust_remote_code=trusted)
        except BaseException:
            lock.release()
            raise
        self._held[model] = weakref.finalize(model, lock.release)
        return model, model.tokenizer

    def release(self, model: SentenceTransformer) -> None:
        """Allow the files of a model of `load_model_and_tokenizer` to be removed. The model itself stays usable."""
        held = self._held.pop(model, None)
        if held is not None:
            held()

    def _entry(self, model: CachedModelRecord) -> CacheEntry:
        path = Path(model.path) if model.path is not None else None
        directory = path if model.source == "local" else None
        info = self._inventory.scan(everything=model.state == "unverified", directory=directory)
        return info.entry_at((model.source, model.model_name, path))

    def _spec(self, name: str, *, source: Source | None = None, revision: str | None = None) -> ModelSpec:
        if source is None and not self._has_configured_hub(name):
            source = self._source
        return resolve_model(self._settings, name, source=source, revision=revision)

    def _has_configured_hub(self, name: str) -> bool:
        """Return whether a name is a directory, or the settings name a hub for this model alone."""
        models = self._settings.models
        if any(
            entry.source for alias, entry in models.model_mapping.items() if name in (alias, *entry.aliases, entry.name)
        ):
            return True
        return name.startswith(PATHS) or any(spec.path for spec in models.specs() if name in (*spec.aliases, spec.name))


def get_model_manager(
    use_modelscope: bool | None = None, *, source: Source | None = None, settings: Settings | None = None
) -> ModelManager:
    """Return a manager of the models on disk.

    Args:
        use_modelscope: True: ModelScope, False: Hugging Face, for models for which nothing else names a hub.
        source: The same, for any hub.
        settings: None: the settings of the environment and of `.env`.

    Raises:
        SettingsError: A setting is wrong.
    """
    if source is None and use_modelscope is not None:
        source = "modelscope" if use_modelscope else "huggingface"
    return ModelManager(load_settings()[0] if settings is None else settings, source=source)


def _release_all(locks: builtins.list[FileLock]) -> None:
    for lock in locks:
        lock.release()
