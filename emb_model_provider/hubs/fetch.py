"""From a model's name to a snapshot on this machine: which hub, which manifest, who transfers, what if not."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

import filelock

from emb_model_provider.errors import CacheNotWritableError, HubError, RepositoryNotFoundError
from emb_model_provider.hubs import manifest
from emb_model_provider.hubs.base import HUBS, Hub, HubConfig, HubName, Progress
from emb_model_provider.hubs.bundled import BUNDLED_REVISION
from emb_model_provider.hubs.storage import CACHE_SETTING, require_writable, storage_error
from emb_model_provider.model_spec import BUNDLED_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emb_model_provider.hubs.snapshot import Snapshot
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.settings import HubSettings

log = logging.getLogger(__name__)

MODELSCOPE_OWNERS = ("damo/", "iic/")
"""Owners whose models are on ModelScope, for `auto`."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+/-]*", re.ASCII)


def resolve_source(spec: ModelSpec) -> HubName:
    """The hub that a model comes from. Looks at the disk, for directories, and asks nobody."""
    if spec.path is not None:
        return "local"
    if spec.source != "auto":
        return spec.source
    if _is_directory(spec.name) or spec.name.startswith(("/", "./", "../", "~")):
        return "local"
    if spec.name == BUNDLED_MODEL and spec.endpoint is None and spec.revision in {None, BUNDLED_REVISION}:
        return "bundled"
    if spec.name.startswith(MODELSCOPE_OWNERS):
        return "modelscope"
    return "huggingface"


def fetch_snapshot(
    spec: ModelSpec,
    settings: HubSettings,
    on_progress: Callable[[Progress], None] = lambda _: None,
    *,
    force: bool = False,
) -> Snapshot:
    """Return a complete, verified snapshot of a model, fetching it where that is needed.

    A snapshot with a valid manifest is used as it is and no request is made; `force` asks the hub again,
    and fetches what changed. Blocks for as long as the transfer takes: call it off the event loop.

    Raises: a `HubError`, whose message says what happened and what to do.
    """
    hub = resolve_source(spec)
    try:
        return _fetch_from(hub, spec, settings, on_progress, force=force)
    except HubError as error:
        # A cache that cannot be written is this machine's trouble; another hub would hide it.
        if hub != "modelscope" or not settings.fallback_to_huggingface:
            raise
        if isinstance(error, CacheNotWritableError):
            raise
        first = error
    log.warning(
        "Model %s could not be had from ModelScope (%s) Trying Hugging Face under the same name, as "
        "EMB_PROVIDER_MODELSCOPE_FALLBACK_TO_HUGGINGFACE asks.",
        spec.name,
        first,
    )
    # The endpoint and the token were meant for ModelScope. Its default branch has another name elsewhere.
    instead = dataclasses.replace(
        spec,
        source="huggingface",
        endpoint=None,
        token=None,
        revision=None if spec.revision == "master" else spec.revision,
    )
    try:
        return _fetch_from("huggingface", instead, settings, on_progress, force=force)
    except HubError as second:
        raise type(second)(f"From ModelScope: {first} And from Hugging Face: {second}") from second


def _fetch_from(
    hub: HubName,
    spec: ModelSpec,
    settings: HubSettings,
    on_progress: Callable[[Progress], None],
    *,
    force: bool,
) -> Snapshot:
    config = _config(hub, spec, settings)
    if hub == "local":
        return _make(hub, config).fetch(str(spec.path or Path(spec.name).expanduser()), None, on_progress)
    if hub == "bundled":
        return _make(hub, config).fetch(spec.name, spec.revision, on_progress)
    if not _REPOSITORY.fullmatch(spec.name) or ".." in spec.name:
        raise RepositoryNotFoundError(
            f"{spec.name!r} is neither a directory here nor a repository's name (owner/name). "
            "Check EMB_PROVIDER_MODEL_NAME."
        )
    if spec.revision is not None and (not _REVISION.fullmatch(spec.revision) or ".." in spec.revision):
        raise HubError(
            f"{spec.revision!r} cannot be a branch, a tag or a commit. Check EMB_PROVIDER_MODEL_REVISION."
        )
    question = manifest.Question(hub, spec.name, spec.revision, config.endpoint)

    def known() -> Snapshot | None:
        return manifest.load_verified(
            question,
            config.manifest_dir,
            lambda done, total: on_progress(Progress("verify", spec.name, done, total)),
        )

    force = force and not config.offline
    if not force and (snapshot := known()) is not None:
        return snapshot
    if config.offline:
        snapshot = _make(hub, config).fetch(spec.name, spec.revision, on_progress)
        with contextlib.suppress(OSError):  # nothing was fetched: a manifest only makes the next start quick
            manifest.save(question, snapshot, config.manifest_dir)
        return snapshot
    require_writable(config.manifest_dir / hub, CACHE_SETTING)
    with _locked(question.lock_path(config.manifest_dir), spec.name):
        if not force and (snapshot := known()) is not None:
            return snapshot
        snapshot = _make(hub, config).fetch(spec.name, spec.revision, on_progress)
        try:
            manifest.save(question, snapshot, config.manifest_dir)
        except OSError as error:
            raise storage_error(error, config.manifest_dir, CACHE_SETTING) or HubError(
                f"The manifest of {spec.name} could not be written to {config.manifest_dir}: {error}. "
                f"Check {CACHE_SETTING}."
            ) from error
    return snapshot


def _config(hub: HubName, spec: ModelSpec, settings: HubSettings) -> HubConfig:
    """The model's own word over the settings'."""
    endpoint, token, cache_dir = {
        "modelscope": (
            settings.modelscope_endpoint,
            settings.modelscope_token,
            settings.modelscope_cache_dir,
        ),
        "huggingface": (settings.hf_endpoint, settings.hf_token, settings.hf_cache_dir),
    }.get(hub, (None, None, None))
    return HubConfig(
        cache_dir=spec.cache_dir or cache_dir,
        manifest_dir=settings.cache_dir / "snapshots",
        endpoint=spec.endpoint or endpoint,
        token=spec.token or token,
        offline=settings.offline,
    )


def _make(hub: HubName, config: HubConfig) -> Hub:
    module, _, name = HUBS[hub].partition(":")
    return cast("Hub", getattr(importlib.import_module(module), name)(config))


def _is_directory(name: str) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # a name the platform cannot look up is no directory
        return False


@contextlib.contextmanager
def _locked(path: Path, repository: str) -> Iterator[None]:
    """Hold the lock of one snapshot, across processes. One that is killed lets go of it."""
    lock = filelock.FileLock(path, thread_local=False)
    try:
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            log.info("Another process or thread is fetching %s; waiting for it to finish.", repository)
            lock.acquire(poll_interval=0.2)
    except OSError as error:  # such as another user's lock file in a shared cache
        raise storage_error(error, path, CACHE_SETTING) or HubError(
            f"The lock {path} cannot be taken: {error}. Set {CACHE_SETTING} to another directory."
        ) from error
    try:
        yield
    finally:
        lock.release()
