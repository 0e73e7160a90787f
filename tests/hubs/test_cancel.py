"""Cancelled and failed downloads: what they raise, and what they leave on disk."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import HubUnavailableError, OperationCancelledError, RepositoryNotFoundError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.progress import CancelToken
from emb_model_provider.snapshots.journal import load_all
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS, spec
from tests.hubs.helpers import files_below, server_of, write_files
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.progress import Progress
    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer

pytestmark = pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])


def cancel_at(phase: str) -> tuple[CancelToken, Callable[[Progress], None]]:
    """Return a token, and a progress callback that cancels it in a phase."""
    cancel = CancelToken()

    def on_progress(progress: Progress) -> None:
        if progress.phase == phase and (phase != "download" or progress.done_bytes > 1_000):
            cancel.cancel()

    return cancel, on_progress


@pytest.mark.parametrize("phase", ["resolve", "download", "verify"])
def test_cancelled_download_leaves_nothing(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    repo: str,
    phase: str,
) -> None:
    """In any phase, no file and no journal is left, and the other hub is not asked."""
    cancel, on_progress = cancel_at(phase)
    config = settings(modelscope_fallback_to_huggingface=True)
    with pytest.raises(OperationCancelledError):
        fetch_snapshot(spec(repo), config, on_progress, cancel=cancel)
    assert not files_below(config.hf_cache_dir, config.modelscope_cache_dir, config.cache_dir / "snapshots")
    assert max(huggingface.bodies().values(), default=0) <= 1
    assert max(modelscope.bodies().values(), default=0) <= 1
    assert not (huggingface.requests and modelscope.requests)


def test_stalled_download_is_cancelled_and_can_be_repeated(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer, repo: str
) -> None:
    """A download from a hub that sends nothing ends soon after it is cancelled, and does not block the next one."""
    config = settings()
    server, weights = server_of(repo, huggingface, modelscope)
    server.faults.hold_after[weights] = 1_000
    cancel = CancelToken()
    reports: list[int] = []
    errors: list[str] = []

    def is_stalled() -> bool:
        return server.bodies()[weights] == 1 and len(reports) > 3 and len(set(reports[-3:])) == 1

    def fetch() -> None:
        try:
            fetch_snapshot(spec(repo), config, lambda progress: reports.append(progress.done_bytes), cancel=cancel)
        except OperationCancelledError as error:
            errors.append(str(error))

    thread = threading.Thread(target=fetch)
    thread.start()
    wait_until(is_stalled)
    cancel.cancel()
    thread.join()
    assert errors == ["The operation was cancelled."]
    assert not files_below(config.hf_cache_dir, config.modelscope_cache_dir, config.cache_dir / "snapshots")
    del server.faults.hold_after[weights]
    assert (fetch_snapshot(spec(repo), config).path / weights).read_bytes() == WEIGHTS
    assert not server.faults.release.is_set()


def test_cancelled_update_keeps_earlier_files(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer, repo: str
) -> None:
    """Cancelling the download of a newer state removes neither the earlier files nor another revision."""
    config = settings()
    server, weights = server_of(repo, huggingface, modelscope)
    first = fetch_snapshot(spec(repo), config)
    server.repos[repo]["extra.json"] = b"{}" * 60_000
    cancel, on_progress = cancel_at("download")
    with pytest.raises(OperationCancelledError):
        fetch_snapshot(spec(repo), config, on_progress, cancel=cancel, force=True)
    assert (first.path / weights).read_bytes() == WEIGHTS
    assert not [path for path in files_below(config.hf_cache_dir, config.modelscope_cache_dir) if "extra" in path.name]
    server.forget()
    assert fetch_snapshot(spec(repo), config) == first
    assert not server.requests


def test_cancelled_download_keeps_files_of_other_programs(settings: Callable[..., HubSettings], repo: str) -> None:
    """Snapshots without a manifest, files that are not complete, and empty directories that existed before are kept."""
    config = settings()
    if repo == HF_REPO:
        directory = config.hf_cache_dir / "models--acme--tiny"
        partial = directory / "blobs" / "abc.incomplete"
    else:
        directory = config.modelscope_cache_dir / "models" / "iic--tiny"
        partial = directory / "snapshots" / "v0" / "other.bin.incomplete"
    (directory / "snapshots" / "empty").mkdir(parents=True)
    write_files(directory / "snapshots" / "v0", {"config.json": b"{}"})
    write_files(partial.parent, {partial.name: b"half"})
    before = files_below(directory)
    cancel, on_progress = cancel_at("verify")
    with pytest.raises(OperationCancelledError):
        fetch_snapshot(spec(repo), config, on_progress, cancel=cancel)
    assert files_below(directory) == before


def test_waiting_for_another_download_can_be_cancelled(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer, repo: str
) -> None:
    """A caller that waits for the same download ends when it is cancelled, and the download goes on."""
    config = settings()
    server, weights = server_of(repo, huggingface, modelscope)
    server.faults.hold_after[weights] = 1_000
    digests: list[str] = []
    other = threading.Thread(target=lambda: digests.append(fetch_snapshot(spec(repo), config).digest))
    other.start()
    try:
        wait_until(lambda: server.bodies()[weights] == 1)
        cancel, on_progress = cancel_at("resolve")
        with pytest.raises(OperationCancelledError):
            fetch_snapshot(spec(repo), config, on_progress, cancel=cancel)
        assert not digests
    finally:
        server.faults.release.set()
        other.join()
    assert digests == [fetch_snapshot(spec(repo), config).digest]


def test_failed_download_has_a_journal_until_it_is_resumed(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer, repo: str
) -> None:
    """What a failed download has left is used by the next one. A download that left nothing has no journal."""
    config = settings()
    manifest_dir = config.cache_dir / "snapshots"
    server, weights = server_of(repo, huggingface, modelscope)

    def fail(progress: Progress) -> None:
        if progress.phase == "verify":
            raise HubUnavailableError("the connection was lost")

    with pytest.raises(HubUnavailableError):
        fetch_snapshot(spec(repo), config, fail)
    (journal,) = load_all(manifest_dir)
    assert (journal.operation, journal.key.repository) == ("fetch", repo)
    server.forget()
    fetch_snapshot(spec(repo), config)
    assert weights not in server.bodies()
    assert not load_all(manifest_dir)
    with pytest.raises(RepositoryNotFoundError):
        fetch_snapshot(spec(f"{repo}-unknown"), config)
    assert not load_all(manifest_dir)
    assert not [
        path for path in files_below(config.hf_cache_dir, config.modelscope_cache_dir) if "unknown" in path.name
    ]
