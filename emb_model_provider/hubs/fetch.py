"""From a model's name to a snapshot on this machine: which hub, which manifest, who transfers, what if not."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from emb_model_provider.errors import (
    CacheNotWritableError,
    FetchCancelledError,
    HubError,
    RepositoryNotFoundError,
)
from emb_model_provider.hubs.base import HUBS, Hub, HubConfig, Progress
from emb_model_provider.hubs.caches import cache_root, places
from emb_model_provider.model_resolver import resolve_source
from emb_model_provider.snapshots import manifest
from emb_model_provider.snapshots.files import CACHE_SETTING, require_writable, storage_error
from emb_model_provider.snapshots.journal import fetching
from emb_model_provider.snapshots.locks import claim

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
    on_progress: Callable[[Progress], None] = lambda _: None,
    *,
    force: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    is_held: Callable[[Path], bool] = lambda _: False,
) -> Snapshot:
    """Return a complete, verified snapshot of a model, fetching it where that is needed.

    A snapshot with a valid manifest is used as it is and no request is made; `force` asks the hub again,
    and fetches what changed. Blocks for as long as the transfer takes: call it off the event loop.

    `include` and `exclude` (patterns of `fnmatch`) choose among the files that serving needs; what they leave need
    not be a model. `on_progress` may raise FetchCancelledError: then the fetch ends soon, with that error, and
    leaves nothing of what it brought. `is_held` says whether a process uses the snapshot in a directory.

    Raises: a `HubError`, whose message says what happened and what to do; ModelInUseError where files that are in use
    would be replaced by newer ones.
    """
    hub = resolve_source(spec)
    given = partial(
        _fetch_from,
        settings=settings,
        on_progress=on_progress,
        force=force,
        patterns=(tuple(include), tuple(exclude)),
        is_held=is_held,
    )
    try:
        return given(hub, spec)
    except HubError as error:
        # A cache that cannot be written is this machine's trouble; another hub would hide it.
        if hub != "modelscope" or not settings.fallback_to_huggingface:
            raise
        if isinstance(error, CacheNotWritableError | FetchCancelledError):
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
        return given("huggingface", instead)
    except FetchCancelledError:
        raise
    except HubError as second:
        raise type(second)(f"From ModelScope: {first} And from Hugging Face: {second}") from second


def question_of(
    hub: HubName,
    spec: ModelSpec,
    settings: HubSettings,
    patterns: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
) -> manifest.Question:
    """What a fetch of a model from one hub asks, which is what its manifest is found by."""
    if hub == "local":
        return manifest.Question("local", str((spec.path or Path(spec.name)).expanduser().absolute()))
    if hub == "bundled":
        return manifest.Question("bundled", spec.name)
    endpoint = _config(hub, spec, settings).endpoint
    return manifest.Question(hub, settings.name_on(hub, spec.name), spec.revision, endpoint, *patterns)


def _fetch_from(
    hub: HubName,
    spec: ModelSpec,
    *,
    settings: HubSettings,
    on_progress: Callable[[Progress], None],
    force: bool,
    patterns: tuple[tuple[str, ...], tuple[str, ...]],
    is_held: Callable[[Path], bool],
) -> Snapshot:
    include, exclude = patterns
    config = _config(hub, spec, settings)
    config = dataclasses.replace(config, include=include, exclude=exclude, is_held=is_held)
    question = question_of(hub, spec, settings, patterns)
    if hub in ("local", "bundled"):
        in_place = _make(hub, config).fetch(question.repository, spec.revision, on_progress)
        manifest.mark_used(question, config.manifest_dir)
        return in_place
    name = question.repository
    _require_sane(name, spec.revision)

    def known() -> Snapshot | None:
        snapshot = manifest.load_verified(
            question,
            config.manifest_dir,
            lambda done, total: on_progress(Progress("verify", name, done, total)),
        )
        if snapshot is not None:
            manifest.mark_used(question, config.manifest_dir)
        return snapshot

    force = force and not config.offline
    if not force and (snapshot := known()) is not None:
        return snapshot
    if config.offline:
        adopted = _make(hub, config).fetch(name, spec.revision, on_progress)
        with contextlib.suppress(OSError):  # nothing was fetched: a manifest only makes the next start quick
            manifest.save(question, adopted, config.manifest_dir)
        return adopted
    require_writable(config.manifest_dir / hub, CACHE_SETTING)
    with _locked(question.lock_path(config.manifest_dir), name, on_progress):
        if not force and (snapshot := known()) is not None:
            return snapshot
        return _fetch_marked(question, config, on_progress)


def _fetch_marked(
    question: manifest.Question, config: HubConfig, on_progress: Callable[[Progress], None]
) -> Snapshot:
    """Fetch, with a marker on the disk for as long as it takes, and write the manifest."""
    where = places(question.hub, question.repository, cache_root(question.hub, config.cache_dir))
    try:
        with fetching(question, where, config.manifest_dir) as touch:

            def told(progress: Progress) -> None:
                touch()
                on_progress(progress)

            snapshot = _make(question.hub, config).fetch(question.repository, question.revision, told)
            manifest.save(question, snapshot, config.manifest_dir)
            return snapshot
    except OSError as error:
        raise storage_error(error, config.manifest_dir, CACHE_SETTING) or HubError(
            f"The manifest of {question.repository} could not be written to {config.manifest_dir}: {error}. "
            f"Check {CACHE_SETTING}."
        ) from error


def _require_sane(name: str, revision: str | None) -> None:
    if not _REPOSITORY.fullmatch(name) or ".." in name:
        raise RepositoryNotFoundError(
            f"{name!r} is neither a directory here nor a repository's name (owner/name). "
            "Check EMB_PROVIDER_MODEL_NAME."
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise HubError(
            f"{revision!r} cannot be a branch, a tag or a commit. Check EMB_PROVIDER_MODEL_REVISION."
        )


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


@contextlib.contextmanager
def _locked(path: Path, repository: str, on_progress: Callable[[Progress], None]) -> Iterator[None]:
    """Hold the lock of one repository, across processes. One that is killed lets go of it."""
    cancelled: list[FetchCancelledError] = []

    def wanted_no_more() -> bool:
        try:
            on_progress(Progress("resolve", repository))
        except FetchCancelledError as error:
            cancelled.append(error)
        return bool(cancelled)

    def tell() -> None:
        log.info("Another process or thread is fetching %s; waiting for it to finish.", repository)

    try:
        held = claim(path, wait_s=None, on_wait=tell, stopped=wanted_no_more)
    except OSError as error:  # such as another user's lock file in a shared cache
        raise storage_error(error, path, CACHE_SETTING) or HubError(
            f"The lock {path} cannot be taken: {error}. Set {CACHE_SETTING} to another directory."
        ) from error
    if held is None:
        raise cancelled[0]
    with held:
        yield
