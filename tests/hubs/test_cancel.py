"""A fetch that is wanted no more: it ends with that word, and nothing of it stays."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import FetchCancelledError, HubUnavailableError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.snapshots.journal import load_all
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS, spec
from tests.hubs.test_processes import both
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.hubs.base import Progress
    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer


def files_in(*directories: Path) -> list[Path]:
    return [path for directory in directories for path in directory.rglob("*")]


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
@pytest.mark.parametrize("phase", ["resolve", "download", "verify"])
def test_a_cancelled_fetch_ends_and_leaves_nothing(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    repo: str,
    phase: str,
) -> None:
    """Whatever it was at, the error comes out as it is, is no reason to try elsewhere, and no file or marker stays."""

    def cancel(progress: Progress) -> None:
        if progress.phase == phase and (phase != "download" or progress.done_bytes > 1_000):
            raise FetchCancelledError("wanted no more")

    config = settings(modelscope_fallback_to_huggingface=True)
    with pytest.raises(FetchCancelledError, match=r"^wanted no more$"):
        fetch_snapshot(spec(repo), config, cancel)
    left = files_in(config.hf_cache_dir, config.modelscope_cache_dir, config.cache_dir / "snapshots")
    assert {path.name for path in left} <= {"huggingface", "modelscope"}
    assert max(huggingface.bodies().values(), default=0) <= 1
    assert max(modelscope.bodies().values(), default=0) <= 1
    assert not (huggingface.requests and modelscope.requests)


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_a_fetch_that_stands_still_can_be_cancelled(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    repo: str,
) -> None:
    """Where the hub sends nothing any more the fetch ends all the same, long before the client gives up."""
    config = settings()
    server, weights = both(repo, huggingface, modelscope)
    server.faults.hold_after[weights] = 1_000
    wanted = threading.Event()
    wanted.set()

    seen: list[int] = []

    def told(progress: Progress) -> None:
        seen.append(progress.done_bytes)
        if not wanted.is_set():
            raise FetchCancelledError("wanted no more")

    def stands_still() -> bool:
        return server.bodies()[weights] == 1 and len(seen) > 3 and len(set(seen[-3:])) == 1

    errors: list[str] = []

    def fetch() -> None:
        try:
            fetch_snapshot(spec(repo), config, told)
        except FetchCancelledError as error:
            errors.append(str(error))

    thread = threading.Thread(target=fetch)
    thread.start()
    wait_until(stands_still)
    wanted.clear()
    thread.join()
    assert errors == ["wanted no more"]
    assert not server.faults.release.is_set()
    left = files_in(config.hf_cache_dir, config.modelscope_cache_dir, config.cache_dir / "snapshots")
    assert {path.name for path in left} <= {"huggingface", "modelscope"}


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_what_was_there_before_stays(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    repo: str,
) -> None:
    """Cancelling the fetch of a changed file takes neither the files that were there nor another revision's."""
    config = settings()
    server, weights = both(repo, huggingface, modelscope)
    first = fetch_snapshot(spec(repo), config)
    server.repos[repo]["extra.json"] = b"{}" * 60_000

    def cancel(progress: Progress) -> None:
        if progress.phase == "download" and progress.done_bytes > 1_000:
            raise FetchCancelledError("wanted no more")

    with pytest.raises(FetchCancelledError):
        fetch_snapshot(spec(repo), config, cancel, force=True)
    assert (first.path / weights).read_bytes() == WEIGHTS
    assert not [
        path for path in files_in(config.hf_cache_dir, config.modelscope_cache_dir) if "extra" in path.name
    ]
    server.forget()
    assert fetch_snapshot(spec(repo), config) == first
    assert not server.requests


def test_who_waits_for_another_fetch_can_be_cancelled(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """One of two callers goes away while the other one fetches, which is not disturbed."""
    config = settings()
    modelscope.faults.hold_after["pytorch_model.bin"] = 1_000
    done: list[str] = []
    other = threading.Thread(target=lambda: done.append(fetch_snapshot(spec(MS_REPO), config).digest))
    other.start()
    try:
        wait_until(lambda: modelscope.bodies()["pytorch_model.bin"] == 1)

        def cancel(_: Progress) -> None:
            raise FetchCancelledError("wanted no more")

        with pytest.raises(FetchCancelledError):
            fetch_snapshot(spec(MS_REPO), config, cancel)
        assert not done
    finally:
        modelscope.faults.release.set()
        other.join()
    assert done == [fetch_snapshot(spec(MS_REPO), config).digest]


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_a_fetch_that_failed_is_marked_until_it_is_resumed(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    repo: str,
) -> None:
    """What a failed transfer brought is kept, with a marker that goes once it is whole; a refusal leaves neither."""
    config = settings()
    server, weights = both(repo, huggingface, modelscope)

    def fail(progress: Progress) -> None:
        if progress.phase == "verify":
            server.faults.status = 503
            raise HubUnavailableError("gone away")

    with pytest.raises(HubUnavailableError):
        fetch_snapshot(spec(repo), config, fail)
    (pending,) = load_all(config.cache_dir / "snapshots")
    assert (pending.doing, pending.question.repository) == ("fetch", repo)
    server.faults.status = None
    server.forget()
    fetch_snapshot(spec(repo), config)
    assert weights not in server.bodies()
    assert not load_all(config.cache_dir / "snapshots")
    with pytest.raises(Exception, match="no repository"):
        fetch_snapshot(spec(f"{repo}-unknown"), config)
    assert not load_all(config.cache_dir / "snapshots")
    assert not [
        path for path in files_in(config.hf_cache_dir, config.modelscope_cache_dir) if "unknown" in path.name
    ]
