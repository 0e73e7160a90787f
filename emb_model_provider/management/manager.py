"""The manager of models on disk: the one that the service, the shell, HTTP and Python programs use."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.backends.precision import resolve_device, resolve_torch_precision
from emb_model_provider.backends.pytorch.import_guards import quiet_imports
from emb_model_provider.errors import HubError, UnsupportedPrecisionError
from emb_model_provider.hubs.fetch import fetch_snapshot, question_of
from emb_model_provider.management.inspection import details_of, verify
from emb_model_provider.management.inventory import Inventory
from emb_model_provider.management.lookup import find
from emb_model_provider.management.removal import Remover
from emb_model_provider.management.types import CachedModelInfo, CompiledModel, info_of
from emb_model_provider.model_resolver import PATHS, choose, resolve_source
from emb_model_provider.settings.loading import load_settings
from emb_model_provider.snapshots import manifest
from emb_model_provider.snapshots.snapshot import hash_file

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Sequence

    from sentence_transformers import SentenceTransformer

    from emb_model_provider.hubs.base import Progress
    from emb_model_provider.management.types import CachedSnapshot, Removal, Verification
    from emb_model_provider.model_spec import ModelSpec, Precision, Source
    from emb_model_provider.settings import Settings
    from emb_model_provider.snapshots.locks import SnapshotHold
    from emb_model_provider.snapshots.snapshot import Snapshot


__all__ = ["CachedModelInfo", "CompiledModel", "ModelManager", "get_model_manager"]

_TRIES = 5
"""How often a snapshot is fetched that somebody removes each time before it can be held."""


class ModelManager:
    """Models on disk, across hubs. Safe to use from several threads and processes at a time.

    `settings` say where the hubs and the caches are; `source` is the hub of models for which nothing else says one.
    """

    def __init__(self, settings: Settings, *, source: Source | None = None) -> None:
        self._settings = settings
        self._source = source
        self._hubs = settings.hubs()
        self._inventory = Inventory(settings)
        self._remover = Remover(self._inventory)

    # --- fetching -------------------------------------------------------------------------------------

    def ensure(
        self,
        spec: ModelSpec,
        *,
        force: bool = False,
        on_progress: Callable[[Progress], None] = lambda _: None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> Snapshot:
        """Return a model's snapshot, complete and verified, fetching it where that is needed.

        `force` asks the hub again and fetches what changed. `include` and `exclude` are patterns (fnmatch) over the
        files that serving needs. `on_progress` may raise FetchCancelledError, which ends the fetch. Blocks.

        Raises: a `HubError`, whose message says what to do; ModelInUseError where a newer state of a branch would
        replace, in one directory, files that a process uses.
        """
        return fetch_snapshot(
            spec,
            self._hubs,
            on_progress,
            force=force,
            include=include,
            exclude=exclude,
            is_held=self._inventory.holds.is_held,
        )

    def acquire(
        self, spec: ModelSpec, on_progress: Callable[[Progress], None] = lambda _: None
    ) -> tuple[Snapshot, SnapshotHold]:
        """Return a model's snapshot, fetched where that is needed, with a hold that keeps it on the disk.

        Nobody removes it, here or in another process, until the hold is released or the process ends.

        Raises: a `HubError`, whose message says what to do.
        """
        held: Path | None = None
        hold: SnapshotHold | None = None
        for _ in range(_TRIES):
            snapshot = self.ensure(spec, on_progress=on_progress)
            if hold is None or held != snapshot.path:
                hold, held = self._inventory.holds.hold(snapshot.path), snapshot.path
            if self._is_there(spec, snapshot):
                return snapshot, hold
            # Removed or replaced in between. The hold stays while it is fetched again: this time nobody can.
        raise HubError(
            f"{spec.name} was removed or replaced each time before it could be loaded. Let nothing else do so meanwhile "
            "(`emb-provider rm`, `pull --force`, or another tool that changes the cache), then try again."
        )

    def _is_there(self, spec: ModelSpec, snapshot: Snapshot) -> bool:
        """Whether a snapshot that is held by now is still the one that it was before."""
        if not manifest.is_whole(snapshot):
            return False
        if snapshot.hub != "modelscope":
            return True
        # A branch keeps its directory there. Who replaces what is in it takes the manifest away first.
        found = manifest.load(question_of("modelscope", spec, self._hubs), self._inventory.manifest_dir)
        return found is not None and found.snapshot == snapshot

    def copy_to(self, snapshot: Snapshot, directory: Path) -> Path:
        """Copy a snapshot's files into a directory, checking each against its hash; return the directory.

        Files that are there already with the right bytes stay as they are; others of the same name are replaced.

        Raises: HubError where the directory cannot be written or the snapshot changed meanwhile.
        """
        with self._inventory.holds.hold(snapshot.path):
            return copy_snapshot(snapshot, directory.expanduser().absolute())

    def compile(
        self,
        spec: ModelSpec,
        *,
        on_progress: Callable[[Progress], None] = lambda _: None,
        on_compiling: Callable[[], None] = lambda: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> CompiledModel:
        """Make what a model is served from, fetching and compiling where that is needed.

        `on_compiling` is called before compiling, which takes seconds to minutes; it ends soon once `stopped`. Blocks.

        Raises: HubError; LoadError where no backend can serve it, or it is below its floor; InterruptedError when
        stopped.
        """
        # Imported only here: to list what is on the disk takes none of it.
        from emb_model_provider.artifacts.prepare import prepare_backend

        snapshot, hold = self.acquire(spec, on_progress)
        with hold:
            prepared = prepare_backend(
                spec,
                snapshot,
                trust_remote_code=self._settings.trust().allows(spec, snapshot.hub),
                cache_dir=self._hubs.cache_dir,
                max_cache_bytes=int(self._settings.max_artifacts_gb * 1024**3),
                on_compiling=on_compiling,
                stopped=stopped,
                fidelity=self._settings.fidelity(),
            )
        return CompiledModel(
            snapshot=snapshot,
            backend=prepared.backend,
            size=prepared.size,
            description=prepared.description,
            notes=prepared.notes,
        )

    # --- looking --------------------------------------------------------------------------------------

    def list(self, *, everything: bool = False) -> list[CachedSnapshot]:
        """Return the models on disk, by name; `everything`: with what other programs left in the hubs' caches."""
        return [record.entry for record in self._inventory.records(everything=everything)]

    def find(
        self, name: str, *, source: Source | None = None, revision: str | None = None
    ) -> builtins.list[CachedSnapshot]:
        """Return the models on disk that a name means, at a hub or a revision where those are given.

        The name is a repository's, under whichever name its hub has it, a directory's, an alias of the settings, an
        `id`, or the last part of a name that only one has.

        Raises: NotCachedError, which names what is there.
        """
        found = find(self._inventory, self._settings, name, source=source, revision=revision)
        return [record.entry for record in found]

    def inspect(self, snapshot: CachedSnapshot) -> dict[str, Any]:
        """Return what a model's files and artifacts say of it, as plain JSON values (see `inspection.details_of`)."""
        record = self._inventory.record_of(snapshot)
        path = Path(snapshot.name) if snapshot.hub == "local" else None
        spec = replace(choose(self._settings, snapshot.name, source=snapshot.hub), path=path)
        trusted = self._settings.trust().allows(spec, snapshot.hub)
        return details_of(record, spec, self._inventory.stock, trust_remote_code=trusted)

    def verify(
        self, snapshot: CachedSnapshot, *, on_progress: Callable[[Progress], None] = lambda _: None
    ) -> Verification:
        """Read all bytes of a model and of its artifacts again. Blocks.

        What has other bytes is fetched, or compiled, again when it is next asked for.

        Raises: NotCachedError where it is gone.
        """
        return verify(snapshot, self._inventory, on_progress)

    # --- removing -------------------------------------------------------------------------------------

    def remove(
        self,
        name: str,
        *,
        source: Source | None = None,
        revision: str | None = None,
        wait_s: float = 0.0,
        dry_run: bool = False,
    ) -> Removal:
        """Remove what `find` finds: files, manifests, and all that was derived from them. All of it or nothing.

        Files of a directory and of the bundled model stay; what was derived from them goes. A dry run raises what the
        removal would raise now.

        Raises: NotCachedError; ModelInUseError where it is in use for longer than `wait_s` seconds; ManagementError.
        """
        return self._remover.remove(
            lambda: find(self._inventory, self._settings, name, source=source, revision=revision),
            wait_s=wait_s,
            dry_run=dry_run,
        )

    def remove_all(self, *, wait_s: float = 0.0, dry_run: bool = False) -> Removal:
        """Remove every model that this package put on the disk; those in use are kept, with the reason."""
        return self._remover.remove_all(wait_s=wait_s, dry_run=dry_run)

    def prune(self, *, dry_run: bool = False) -> Removal:
        """Remove what nobody can use: what killed processes left, and artifacts whose snapshot is gone."""
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
        """Return the directory of a model's files, fetched where that is needed; `local_dir` is where to copy them.

        Raises: a `HubError`, whose message says what to do.
        """
        spec = self._spec(name, source=source, revision=revision)
        snapshot = self.ensure(spec, force=force, include=include, exclude=exclude)
        return snapshot.path if local_dir is None else self.copy_to(snapshot, Path(local_dir))

    def list_cached_models(self) -> builtins.list[CachedModelInfo]:
        """Return the models on disk as plain values."""
        return [info_of(entry) for entry in self.list()]

    def evict_model(self, name: str, *, wait_s: float = 0.0) -> Removal:
        """Remove a model from the disk; of a manager that was made for one hub, from that one.

        Raises: as `remove`.
        """
        source = resolve_source(self._spec(name)) if self._source is not None else None
        return self.remove(name, source=source, wait_s=wait_s)

    def load_model_and_tokenizer(
        self, name: str, *, precision: Precision | None = None, device: str | None = None
    ) -> tuple[SentenceTransformer, Any]:
        """Return a model as sentence-transformers has it, and its tokenizer; fp32 unless said otherwise.

        It is the pipeline that compiled models are compared with: a ModelScope repository without `modules.json` has
        the pooling that its configuration declares. It stays on the disk for as long as the model is referred to.

        Raises: HubError; LoadError; UnsupportedPrecisionError for int8 and int4; ImportError without torch.
        """
        spec = self._spec(name)
        if device is not None:
            spec = replace(spec, device=device)
        snapshot, hold = self.acquire(spec)
        try:
            trusted = self._settings.trust().allows(spec, snapshot.hub)
            model = load_reference(spec, snapshot, precision or "fp32", trust_remote_code=trusted)
        except BaseException:
            hold.release()
            raise
        weakref.finalize(model, hold.release)
        return model, model.tokenizer

    def _spec(self, name: str, *, source: Source | None = None, revision: str | None = None) -> ModelSpec:
        if source is None and not self._says_its_hub(name):
            source = self._source
        return choose(self._settings, name, source=source, revision=revision)

    def _says_its_hub(self, name: str) -> bool:
        """Whether a model is a directory, or the settings say a hub for this one alone."""
        mapped = self._settings.model_mapping.items()
        if any(entry.source for alias, entry in mapped if name in (alias, entry.name)):
            return True
        specs = self._settings.models().specs
        return name.startswith(PATHS) or any(spec.path for spec in specs if name in (spec.alias, spec.name))


def get_model_manager(
    use_modelscope: bool | None = None, *, source: Source | None = None, settings: Settings | None = None
) -> ModelManager:
    """Return a manager of the models on disk.

    `use_modelscope` chooses ModelScope (true) or Hugging Face (false) for models for which nothing else says a hub, as
    `source` does, which has more names; without either, the settings do. `settings` are those of the environment and
    of `.env` unless they are given.

    Raises: SettingsError.
    """
    if source is None and use_modelscope is not None:
        source = "modelscope" if use_modelscope else "huggingface"
    return ModelManager(load_settings()[0] if settings is None else settings, source=source)


def copy_snapshot(snapshot: Snapshot, directory: Path) -> Path:
    """Copy a held snapshot's files into a directory, checking each against its hash; return the directory.

    Files that are there already with the right bytes stay as they are; others of the same name are replaced.

    Raises: HubError where the directory cannot be written, or the snapshot has other bytes than it had.
    """
    try:
        for file in snapshot.files:
            place = directory / file.path
            if _has(place, file.sha256, file.size):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_name(f".{place.name}.incomplete")
            try:
                shutil.copyfile(snapshot.path / file.path, partial)
                if not _has(partial, file.sha256, file.size):
                    raise HubError(
                        f"{file.path} of {snapshot.repository} in {snapshot.path} has other bytes than it had. "
                        f"Fetch it again: `emb-provider pull --force {snapshot.repository}`."
                    )
                partial.replace(place)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise HubError(
            f"{snapshot.repository} could not be copied to {directory}: {error}. Make room or make it writable, or "
            "choose another directory."
        ) from error
    return directory


def _has(path: Path, sha256: str, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size and hash_file(path).sha256 == sha256


def load_reference(
    spec: ModelSpec, snapshot: Snapshot, precision: Precision, *, trust_remote_code: bool
) -> SentenceTransformer:
    """Load a snapshot with sentence-transformers on the device of `spec`, with the pooling that it declares.

    Raises: LoadError; UnsupportedPrecisionError for int8 and int4; ImportError without torch.
    """
    if precision in ("int8", "int4"):
        raise UnsupportedPrecisionError(
            f"Precision {precision} is not available here: choose fp32, fp16, bf16 or auto. `Embedder` and the "
            "service have it."
        )
    # Imported only here: the service manages models without torch.
    with quiet_imports():
        from emb_model_provider.backends.pytorch.pipeline import load_pipeline, torch_device_facts

    facts = torch_device_facts()
    device = resolve_device(spec.device, facts)
    plan = plan_pipeline(spec, snapshot, trust_remote_code=trust_remote_code)
    return load_pipeline(
        plan,
        precision=resolve_torch_precision(precision, device, facts),
        device=device,
        trust_remote_code=trust_remote_code,
    )
