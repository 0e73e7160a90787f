"""From a model to a verified snapshot on this machine: chooses the hub, reuses manifests, locks, and downloads."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.errors import CacheNotWritableError, HubError, OperationCancelledError, RepositoryNotFoundError
from emb_model_provider.hubs.base import HubConfig, create_hub
from emb_model_provider.hubs.caches import cache_root, contents, leftovers, remove_leftovers, repository_dirs
from emb_model_provider.model_resolver import resolve_source
from emb_model_provider.progress import CancelToken, OnProgress, Progress, ignore_progress
from emb_model_provider.snapshots import journal, manifest
from emb_model_provider.snapshots.files import CACHE_SETTING, require_writable, translate_os_error
from emb_model_provider.snapshots.locks import lock_exclusive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from emb_model_provider.model_spec import HubName, ModelSpec
    from emb_model_provider.settings import HubSettings
    from emb_model_provider.snapshots.snapshot import Snapshot

log = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+/-]*", re.ASCII)


def fetch_snapshot(
    spec: ModelSpec,
    settings: HubSettings,
    on_progress: OnProgress = ignore_progress,
    *,
    cancel: CancelToken | None = None,
    force: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    is_held: Callable[[Path], bool] = lambda _: False,
) -> Snapshot:
    """Return a complete, verified snapshot of a model, downloading it if necessary.

    A snapshot with a valid manifest is returned without a request to the hub. Blocks for as long as the download
    takes: call it off the event loop.

    Args:
        spec: The model.
        settings: How the hubs are reached, and where files are kept.
        on_progress: Called with the progress of the download.
        cancel: Ends the download soon after it is cancelled. What was downloaded so far is removed.
        force: Ask the hub even if there is a valid manifest, and download what changed.
        include: Patterns (fnmatch) of the files to download, among those that serving needs. Empty: all of them. With
            patterns the result need not be a complete model.
        exclude: Patterns of files not to download.
        is_held: Returns whether a process uses the snapshot in a directory.

    Raises:
        HubError: The message says what happened and what to do.
        ModelInUseError: Files that are in use would be replaced by newer ones.
        OperationCancelledError: `cancel` was cancelled.
    """
    hub = resolve_source(spec)
    token = cancel or CancelToken()

    def report(progress: Progress) -> None:
        on_progress(progress)
        token.raise_if_cancelled()

    fetch = partial(
        _fetch_from,
        settings=settings,
        force=force,
        patterns=(tuple(include), tuple(exclude)),
        is_held=is_held,
        on_progress=report,
        cancel=token,
    )
    try:
        return fetch(hub, spec)
    except HubError as error:
        if hub != "modelscope" or not settings.modelscope_fallback_to_huggingface:
            raise
        if isinstance(error, CacheNotWritableError):  # a fault of this machine, which another hub would hide
            raise
        first = error
    log.warning(
        "Model %s could not be downloaded from ModelScope (%s) Trying Hugging Face under the same name, because "
        "EMB_PROVIDER_MODELSCOPE_FALLBACK_TO_HUGGINGFACE is set.",
        spec.name,
        first,
    )
    # The endpoint and the token are ModelScope's, and Hugging Face has another default branch.
    instead = dataclasses.replace(
        spec,
        source="huggingface",
        endpoint=None,
        token=None,
        revision=None if spec.revision == "master" else spec.revision,
    )
    try:
        return fetch("huggingface", instead)
    except HubError as second:
        raise type(second)(f"From ModelScope: {first} And from Hugging Face: {second}") from second


def manifest_key(
    hub: HubName, spec: ModelSpec, settings: HubSettings, patterns: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
) -> manifest.ManifestKey:
    """Return the key of the manifest of a model that is downloaded from one hub."""
    if hub == "local":
        return manifest.ManifestKey("local", str((spec.path or Path(spec.name)).expanduser().absolute()))
    if hub == "bundled":
        return manifest.ManifestKey("bundled", spec.name)
    endpoint = _config(hub, spec, settings).endpoint
    return manifest.ManifestKey(hub, settings.name_on(hub, spec.name), spec.revision, endpoint, *patterns)


def _fetch_from(
    hub: HubName,
    spec: ModelSpec,
    *,
    settings: HubSettings,
    force: bool,
    patterns: tuple[tuple[str, ...], tuple[str, ...]],
    is_held: Callable[[Path], bool],
    on_progress: OnProgress,
    cancel: CancelToken,
) -> Snapshot:
    include, exclude = patterns
    config = dataclasses.replace(_config(hub, spec, settings), include=include, exclude=exclude, is_held=is_held)
    key = manifest_key(hub, spec, settings, patterns)
    if hub in ("local", "bundled"):
        in_place = create_hub(hub, config).fetch(key.repository, spec.revision, on_progress, cancel)
        manifest.mark_used(key, config.manifest_dir)
        return in_place
    name = key.repository
    _validate_ids(name, spec.revision)

    def load_known() -> Snapshot | None:
        snapshot = manifest.load_verified(
            key, config.manifest_dir, lambda done, total: on_progress(Progress("verify", name, done, total))
        )
        if snapshot is not None:
            manifest.mark_used(key, config.manifest_dir)
        return snapshot

    force = force and not config.offline
    if not force and (snapshot := load_known()) is not None:
        return snapshot
    if config.offline:
        adopted = create_hub(hub, config).fetch(name, spec.revision, on_progress, cancel)
        with contextlib.suppress(OSError):  # the manifest only makes the next start faster
            manifest.save(key, adopted, config.manifest_dir)
        return adopted
    require_writable(config.manifest_dir / hub, CACHE_SETTING)
    with _locked(key.lock_path(config.manifest_dir), name, on_progress, cancel):
        if not force and (snapshot := load_known()) is not None:
            return snapshot
        return _download(key, config, on_progress, cancel)


def _download(key: manifest.ManifestKey, config: HubConfig, on_progress: OnProgress, cancel: CancelToken) -> Snapshot:
    """Download with a journal on disk, and write the manifest at the end. The caller holds the repository's lock.

    A download that is cancelled leaves nothing. One that fails, or is interrupted by Ctrl-C, leaves what can be resumed,
    with its journal.
    """
    manifest_dir = config.manifest_dir
    try:
        written = _begin_journal(key, config)

        def report(progress: Progress) -> None:
            written.touch(manifest_dir)
            on_progress(progress)

        try:
            snapshot = create_hub(key.hub, config).fetch(key.repository, key.revision, report, cancel)
            manifest.save(key, snapshot, manifest_dir)
        except Exception as error:
            written.touch(manifest_dir, now=True)
            if isinstance(error, OperationCancelledError) or not leftovers(written, _complete(config)).size:
                with contextlib.suppress(OSError):
                    remove_leftovers(written, manifest_dir)
            raise
        written.delete(manifest_dir)
    except OSError as error:
        raise translate_os_error(error, manifest_dir, CACHE_SETTING) or HubError(
            f"The manifest of {key.repository} could not be written to {manifest_dir}: {error}. Check {CACHE_SETTING}."
        ) from error
    return snapshot


def _begin_journal(key: manifest.ManifestKey, config: HubConfig) -> journal.Journal:
    root = cache_root(key.hub, config.cache_dir)
    before = set(contents(key.hub, key.repository, root))
    earlier = journal.load(key.journal_path(config.manifest_dir))
    if earlier is not None and earlier.operation == "fetch":
        # What an interrupted download has left is this download's own.
        own = leftovers(earlier, _complete(config)).paths
        before = {path for path in before if path in earlier.before or not (path in own or path.is_dir())}
    elif earlier is not None and earlier.path is not None and not earlier.changed_by_others(earlier.path):
        before = {path for path in before if not path.is_relative_to(earlier.path)}  # a removal was interrupted
    locations = [(root, path) for path in repository_dirs(key.hub, key.repository, root)]
    return journal.begin(key, "fetch", locations, config.manifest_dir, before=before)


def _complete(config: HubConfig) -> set[Path]:
    """Return the directories of all snapshots that have a manifest."""
    return {found.snapshot.path for _, found in manifest.load_all(config.manifest_dir)}


def _validate_ids(name: str, revision: str | None) -> None:
    if not _REPOSITORY.fullmatch(name) or ".." in name:
        raise RepositoryNotFoundError(
            f"{name!r} is neither a directory on this machine nor a repository id (owner/name). "
            "Check EMB_PROVIDER_MODEL_NAME."
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise HubError(f"{revision!r} is not a valid branch, tag or commit. Check EMB_PROVIDER_MODEL_REVISION.")


def _config(hub: HubName, spec: ModelSpec, settings: HubSettings) -> HubConfig:
    return HubConfig(
        cache_dir=spec.cache_dir or settings.hub_cache_dir(hub),
        manifest_dir=settings.cache_dir / "snapshots",
        endpoint=spec.endpoint or settings.endpoint(hub),
        token=spec.token or settings.token(hub),
        offline=settings.offline,
    )


@contextlib.contextmanager
def _locked(path: Path, repository: str, on_progress: OnProgress, cancel: CancelToken) -> Iterator[None]:
    """Hold the lock of one repository, across processes. It is released if its process is killed."""

    def log_waiting() -> None:
        on_progress(Progress("resolve", repository))
        log.info("Another process or thread is downloading %s; waiting for it to finish.", repository)

    try:
        lock = lock_exclusive(path, on_wait=log_waiting, cancel=cancel)
    except OSError as error:  # such as another user's lock file in a shared cache
        raise translate_os_error(error, path, CACHE_SETTING) or HubError(
            f"The lock {path} cannot be taken: {error}. Set {CACHE_SETTING} to another directory."
        ) from error
    with lock:
        yield
