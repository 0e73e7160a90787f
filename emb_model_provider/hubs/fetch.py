"""From a model to a verified snapshot on this machine: chooses the hub, reuses manifests, locks, and downloads."""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from emb_model_provider.errors import (
    CacheNotWritableError,
    HubError,
    HubUnavailableError,
    IncompleteRepositoryError,
    OperationCancelledError,
    RepositoryNotFoundError,
)
from emb_model_provider.hubs import caches
from emb_model_provider.hubs import dependencies as dependencies_of
from emb_model_provider.hubs.base import HubConfig, create_hub, similar_repositories
from emb_model_provider.model_resolver import hidden_repository_note, resolve_source
from emb_model_provider.progress import CancelToken, OnProgress, Progress, ignore_progress
from emb_model_provider.settings import TrustSettings
from emb_model_provider.snapshots import journal, manifest
from emb_model_provider.snapshots.files import CACHE_SETTING, has_sizes, require_writable, translate_os_error
from emb_model_provider.snapshots.locks import lock_exclusive
from emb_model_provider.snapshots.manifest import ALL_FILES, ManifestKey

if TYPE_CHECKING:
    from emb_model_provider.hubs.base import RemoteHub
    from emb_model_provider.hubs.dependencies import Requirement
    from emb_model_provider.model_spec import HubName, ModelSpec
    from emb_model_provider.settings import HubSettings
    from emb_model_provider.snapshots.locks import FileLock
    from emb_model_provider.snapshots.manifest import FilePatterns
    from emb_model_provider.snapshots.snapshot import Snapshot

logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+/-]*", re.ASCII)


def fetch_snapshot(
    spec: ModelSpec,
    settings: HubSettings,
    on_progress: OnProgress = ignore_progress,
    *,
    cancel: CancelToken | None = None,
    force: bool = False,
    patterns: FilePatterns = ALL_FILES,
    trust: TrustSettings | None = None,
) -> Snapshot:
    """Return a complete, verified snapshot of a model, downloading it if necessary. Blocks.

    The snapshots of the repositories that the model needs are its dependencies: the base model of an adapter and, if the
    code of the model may run, the repositories that it takes code from.

    Args:
        spec: The model.
        settings: Where the hubs and the caches are.
        on_progress: Called with the progress of the downloads.
        cancel: Ends the download. What was downloaded so far is removed.
        force: Ask the hub even if there is a valid manifest, and download what changed.
        patterns: The files to download. With patterns, the result need not be a complete model, and has no dependencies.
        trust: Whether code of the model may run. None: it may not.

    Raises:
        HubError: The message says what to do.
        UnsupportedModelError: It is an adapter whose base model cannot be used.
        OperationCancelledError: `cancel` was cancelled.
    """
    token = cancel or CancelToken()

    def report(progress: Progress) -> None:
        on_progress(progress)
        token.raise_if_cancelled()

    run = _Run(settings, trust or TrustSettings(), report, token, force=force)
    return run.fetch_files(spec, patterns)[1] if patterns else run.fetch_model(spec)[1]


def manifest_key(
    hub: HubName, spec: ModelSpec, settings: HubSettings, patterns: FilePatterns = ALL_FILES
) -> ManifestKey:
    """Return the key of the manifest of a model that is downloaded from one hub."""
    if hub == "local":
        return ManifestKey("local", str((spec.path or Path(spec.name)).expanduser().absolute()))
    if hub == "bundled":
        return ManifestKey("bundled", spec.name)
    endpoint = spec.endpoint or settings.endpoint(hub)
    return ManifestKey(hub, settings.name_on(hub, spec.name), spec.revision, endpoint, patterns)


def find_source(spec: ModelSpec, settings: HubSettings, patterns: FilePatterns = ALL_FILES) -> HubName:
    """Return the hub of a model like `resolve_source`; without a hub in its spec, the one whose copy is on disk.

    A verified copy takes precedence over one that another program has downloaded. Sends no requests.
    """
    hub: HubName = resolve_source(spec)
    if spec.source != "auto" or hub not in caches.REMOTE_HUBS:
        return hub
    candidates = (hub, *(other for other in caches.REMOTE_HUBS if other != hub))
    for has_copy in (_has_snapshot, _has_files):
        for candidate in candidates:
            if has_copy(manifest_key(candidate, spec, settings, patterns), spec, settings):
                return candidate
    return hub


def _has_snapshot(key: ManifestKey, _: ModelSpec, settings: HubSettings) -> bool:
    found = manifest.load(key, settings.cache_dir / "snapshots")
    return found is not None and has_sizes(found.snapshot.path, found.snapshot.files)


def _has_files(key: ManifestKey, spec: ModelSpec, settings: HubSettings) -> bool:
    root = caches.cache_root(key.hub, spec.cache_dir or settings.hub_cache_dir(key.hub))
    directories = caches.snapshot_dirs(key.hub, key.repository, root) if _is_valid_id(key.repository) else ()
    return key.revision is None and any((path / "config.json").exists() for path in directories)


def _is_valid_id(repository: str) -> bool:
    return _REPOSITORY.fullmatch(repository) is not None and ".." not in repository


def _config(hub: HubName, spec: ModelSpec, settings: HubSettings, patterns: FilePatterns) -> HubConfig:
    return HubConfig(
        cache_dir=spec.cache_dir or settings.hub_cache_dir(hub),
        manifest_dir=settings.cache_dir / "snapshots",
        endpoint=spec.endpoint or settings.endpoint(hub),
        token=spec.token or settings.token(hub),
        offline=settings.offline,
        patterns=patterns,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """Gets a model and everything that it needs, each from its hub or the one to fall back to."""

    settings: HubSettings
    trust: TrustSettings
    on_progress: OnProgress
    cancel: CancelToken
    force: bool

    def fetch_model(self, spec: ModelSpec, *, adapter: Snapshot | None = None) -> tuple[ManifestKey, Snapshot]:
        """Get a model with its dependencies; as the base model of an adapter, it must have weights."""
        key, snapshot = self.fetch_files(spec, ALL_FILES)
        return key, self._with_dependencies(key, snapshot, spec, adapter)

    def _with_dependencies(
        self, key: ManifestKey, snapshot: Snapshot, spec: ModelSpec, adapter: Snapshot | None
    ) -> Snapshot:
        if adapter is not None:
            # Before its own dependencies, because two adapters could name each other.
            dependencies_of.check_base(adapter, snapshot)
        keys: dict[str, ManifestKey] = {}
        dependencies: dict[str, Snapshot] = {}
        trusted = self.trust.allows(spec, snapshot.hub)
        for requirement in dependencies_of.required_repositories(snapshot, spec.name, with_code=trusted):
            found = self._fetch_required(requirement, spec, snapshot)
            if found is not None:
                keys[requirement.name], dependencies[requirement.name] = found
        composed = snapshot.with_dependencies(dependencies)
        with contextlib.suppress(OSError):  # without it, `prune` removes the compiled form, and it is compiled again
            manifest.record_dependencies(key, composed, keys, self.settings.cache_dir / "snapshots")
        return composed

    def _fetch_required(
        self, requirement: Requirement, spec: ModelSpec, snapshot: Snapshot
    ) -> tuple[ManifestKey, Snapshot] | None:
        """Get a repository that a model needs; None if it is code from a hub whose code may not run."""
        if snapshot.is_mirror:
            return self._find_in_mirror(requirement, spec, snapshot)
        required = dependencies_of.spec_of(requirement, spec, snapshot)
        try:
            if requirement.kind == "code":
                if not self.trust.allows(spec, resolve_source(required)):
                    return None
                code = self.fetch_files(required, requirement.patterns)
                return code if self.trust.allows(spec, code[1].hub) else None
            return self.fetch_model(required, adapter=snapshot)
        except HubError as error:
            raise dependencies_of.explain(error, requirement, snapshot) from error

    def _find_in_mirror(
        self, requirement: Requirement, spec: ModelSpec, snapshot: Snapshot
    ) -> tuple[ManifestKey, Snapshot] | None:
        """Return a repository that a model in a mirror needs. Asks no hub, because a mirror has everything or is wrong."""
        found = snapshot.dependency(requirement.name)
        if found is None:
            raise IncompleteRepositoryError(
                f"{snapshot.repository} needs {requirement.name} ({requirement.file} names it), which is not in the mirror "
                f"{snapshot.path}. Run `emb-provider mirror` again where the hub can be reached"
                f"{', with EMB_PROVIDER_TRUST_REMOTE_CODE=true' if requirement.kind == 'code' else ''}."
            )
        key = ManifestKey("local", str(found.path))
        if requirement.kind == "code":
            return (key, found) if self.trust.allows(spec, found.hub) else None
        return key, self._with_dependencies(key, found, replace(spec, name=requirement.name), snapshot)

    def fetch_files(self, spec: ModelSpec, patterns: FilePatterns) -> tuple[ManifestKey, Snapshot]:
        """Get the files of one repository."""
        hub = find_source(spec, self.settings, patterns)
        try:
            return self._fetch_from(hub, spec, patterns)
        except HubError as error:
            if hub == "local":
                raise type(error)(f"{error}{hidden_repository_note(spec)}") from error
            if hub != "modelscope" or not self.settings.modelscope_fallback_to_huggingface:
                raise
            if isinstance(error, CacheNotWritableError):  # a fault of this machine, which another hub would hide
                raise
            first = error
        logger.warning(
            "Model %s could not be downloaded from ModelScope (%s) Trying Hugging Face under the same name, because "
            "EMB_PROVIDER_MODELSCOPE_FALLBACK_TO_HUGGINGFACE is set.",
            spec.name, first,
        )  # fmt: skip
        # The endpoint and the token are ModelScope's, and Hugging Face has another default branch.
        revision = None if spec.revision == "master" else spec.revision
        instead = replace(spec, source="huggingface", endpoint=None, token=None, revision=revision)
        try:
            return self._fetch_from("huggingface", instead, patterns)
        except HubError as second:
            raise type(second)(f"From ModelScope: {first} And from Hugging Face: {second}") from second

    def _fetch_from(self, hub: HubName, spec: ModelSpec, patterns: FilePatterns) -> tuple[ManifestKey, Snapshot]:
        config = _config(hub, spec, self.settings, patterns)
        key = manifest_key(hub, spec, self.settings, patterns)
        return key, _Fetch(key, spec.revision, config, self.on_progress, self.cancel).run(force=self.force)


@dataclass(frozen=True, slots=True)
class _Fetch:
    """Gets one model from one hub, or from the files of an earlier download."""

    key: ManifestKey
    revision: str | None
    """As requested. The key of a bundled model has none."""
    config: HubConfig
    on_progress: OnProgress
    cancel: CancelToken

    def run(self, *, force: bool) -> Snapshot:
        config, key = self.config, self.key
        if key.hub in ("local", "bundled"):
            in_place = self._fetch_from_hub(self.on_progress)
            manifest.mark_used(key, config.manifest_dir)
            return in_place
        self._validate_ids()
        force = force and not config.offline
        if not force and (snapshot := self._load_known()) is not None:
            return snapshot
        if config.offline:
            adopted = self._fetch_from_hub(self.on_progress)
            with contextlib.suppress(OSError):  # the manifest only makes the next start faster
                manifest.save(key, adopted, config.manifest_dir)
            return adopted
        require_writable(config.manifest_dir / key.hub, CACHE_SETTING)
        with self._lock():
            if not force and (snapshot := self._load_known()) is not None:
                return snapshot
            return self._download()

    def _fetch_from_hub(self, on_progress: OnProgress) -> Snapshot:
        hub = create_hub(self.key.hub, self.config)
        name = self.key.repository
        try:
            return hub.fetch(name, self.revision, on_progress, self.cancel)
        except RepositoryNotFoundError as error:
            if self.key.hub not in caches.REMOTE_HUBS or self.config.offline:
                raise
            similar = similar_repositories(cast("RemoteHub", hub), name)
            hint = f" Did you mean {' or '.join(similar)}?" if similar else ""
            raise RepositoryNotFoundError(f"{error}{hint}") from error
        except HubUnavailableError as error:
            if "/" in name:
                raise
            raise HubUnavailableError(f"{error} {name} has no owner: a repository id is owner/name.") from error

    def _validate_ids(self) -> None:
        name, revision = self.key.repository, self.revision
        if not _is_valid_id(name):
            raise RepositoryNotFoundError(
                f"{name!r} is neither a directory on this machine nor a repository id (owner/name). Check the name."
            )
        if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise HubError(f"{revision!r} is not a valid branch, tag or commit. Check the revision.")

    def _load_known(self) -> Snapshot | None:
        key, manifest_dir = self.key, self.config.manifest_dir
        snapshot = manifest.load_verified(
            key, manifest_dir, lambda done, total: self.on_progress(Progress("verify", key.repository, done, total))
        )
        if snapshot is not None:
            manifest.mark_used(key, manifest_dir)
        return snapshot

    def _lock(self) -> FileLock:
        """Lock the repository across processes. The lock is released if its process is killed."""
        path = self.key.lock_path(self.config.manifest_dir)

        def log_waiting() -> None:
            self.on_progress(Progress("resolve", self.key.repository))
            logger.info("Another process or thread is downloading %s; waiting for it to finish.", self.key.repository)

        try:
            return lock_exclusive(path, on_wait=log_waiting, cancel=self.cancel)
        except OSError as error:  # such as another user's lock file in a shared cache
            raise translate_os_error(error, path, CACHE_SETTING) or HubError(
                f"The lock {path} cannot be taken: {error}. Set {CACHE_SETTING} to another directory."
            ) from error

    def _download(self) -> Snapshot:
        """Download with a journal on disk, and write the manifest at the end. The caller holds the repository's lock.

        A download that is cancelled leaves nothing. One that fails, or is interrupted by Ctrl-C, leaves what can be
        resumed, with its journal.
        """
        key, manifest_dir = self.key, self.config.manifest_dir
        earlier = journal.load(key.journal_path(manifest_dir))
        try:
            written = self._begin_journal(earlier)

            def report(progress: Progress) -> None:
                written.touch(manifest_dir)
                self.on_progress(progress)

            try:
                snapshot = self._fetch_from_hub(report)
                manifest.save(key, snapshot, manifest_dir)
            except Exception as error:
                written.touch(manifest_dir, now=True)
                is_cancelled = isinstance(error, OperationCancelledError)
                if is_cancelled or not caches.leftovers(written, manifest.complete_directories(manifest_dir)).size:
                    with contextlib.suppress(OSError):
                        caches.remove_leftovers(written, manifest_dir)
                raise
            if earlier is not None:
                caches.remove_partial_files(earlier, manifest_dir)
            written.delete(manifest_dir)
        except OSError as error:
            raise translate_os_error(error, manifest_dir, CACHE_SETTING) or HubError(
                f"The manifest of {key.repository} could not be written to {manifest_dir}: {error}. Check "
                f"{CACHE_SETTING}."
            ) from error
        return snapshot

    def _begin_journal(self, earlier: journal.Journal | None) -> journal.Journal:
        key, manifest_dir = self.key, self.config.manifest_dir
        root = caches.cache_root(key.hub, self.config.cache_dir)
        before = set(caches.contents(key.hub, key.repository, root))
        if earlier is not None and earlier.operation == "fetch":
            # What an interrupted download has left is this download's own.
            own = caches.leftovers(earlier, manifest.complete_directories(manifest_dir)).paths
            before = {path for path in before if path in earlier.before or not (path in own or path.is_dir())}
        elif earlier is not None and earlier.path is not None and not earlier.changed_by_others(earlier.path):
            before = {path for path in before if not path.is_relative_to(earlier.path)}  # a removal was interrupted
        locations = [(root, path) for path in caches.repository_dirs(key.hub, key.repository, root)]
        return journal.begin(key, "fetch", locations, manifest_dir, before=before)
