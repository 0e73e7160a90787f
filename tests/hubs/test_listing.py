"""A hub cannot fill disk or memory: downloads end at the announced size, and listings are bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import CorruptSnapshotError, HubError
from emb_model_provider.hubs import listing
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.hubs.listing import bounded_files, is_plain_path, require_size
from tests.hubs.conftest import HF_REPO, MS_REPO, spec
from tests.hubs.helpers import files_below, server_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer

MIB = 2**20
BOTH = pytest.mark.parametrize("name", [HF_REPO, MS_REPO])


@BOTH
def test_download_ends_at_the_announced_size(
    name: str,
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    tmp_path: Path,
) -> None:
    """And one block. The server would send bytes until the disk is full."""
    server, weights = server_of(name, huggingface, modelscope)
    server.faults.endless.add(weights)
    with pytest.raises(HubError):
        fetch_snapshot(spec(name, source="huggingface" if name == HF_REPO else "modelscope"), settings())
    assert server.faults.sent < 300 * MIB
    kept = sum(path.stat().st_size for path in files_below(tmp_path) if path.is_file())
    assert kept < 100 * MIB


@BOTH
def test_listings_are_bounded_by_their_bytes(
    name: str, settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer
) -> None:
    """An answer without end is not read to its end."""
    server, _ = server_of(name, huggingface, modelscope)
    paths = [f"/api/models/{HF_REPO}/tree/{huggingface.commit(HF_REPO)}", f"/api/v1/models/{MS_REPO}/repo/files"]
    server.faults.endless.update(paths)
    with pytest.raises(HubError, match=r"listing of the repository has more than 32 MiB.*Check the name"):
        fetch_snapshot(spec(name, source="huggingface" if name == HF_REPO else "modelscope"), settings())
    assert server.faults.sent < 100 * MIB


def test_listings_are_bounded_by_their_pages(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page names a next one."""
    monkeypatch.setattr(listing, "MAX_ANSWERS", 20)
    huggingface.faults.endless_pages = True
    with pytest.raises(HubError, match="more than 20 answers"):
        fetch_snapshot(spec(HF_REPO), settings())
    assert len(huggingface.requests) < 30


@BOTH
def test_listings_are_bounded_by_their_files(
    name: str,
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listing, "MAX_FILES", 50)
    server, _ = server_of(name, huggingface, modelscope)
    server.faults.listed_too = [f"{number}.txt" for number in range(60)]
    with pytest.raises(HubError, match="more than 50 files"):
        fetch_snapshot(spec(name, source="huggingface" if name == HF_REPO else "modelscope"), settings())
    assert server.bodies() == {}


@BOTH
@pytest.mark.parametrize("file", ["a\nb.json", "a\u202eb.json", "a ", " a/b", "x" * 256, "\x1b[31m.json"])
def test_repositories_with_names_that_are_not_plain_are_refused(
    name: str,
    file: str,
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
) -> None:
    """Nothing is downloaded, and the message has no control characters."""
    server, _ = server_of(name, huggingface, modelscope)
    server.faults.listed_too = [file]
    with pytest.raises(CorruptSnapshotError, match="nothing was downloaded") as caught:
        fetch_snapshot(spec(name, source="huggingface" if name == HF_REPO else "modelscope"), settings())
    assert caught.value.message.isprintable()
    assert server.bodies() == {}


def test_usual_names_are_plain() -> None:
    for name in ("config.json", "1_Pooling/config.json", "模型 说明.md", "a b (1).txt", "ünïcode-é.bin"):
        assert is_plain_path(name)


@pytest.mark.parametrize("size", [-1, None, "5", 1.5, True])
def test_sizes_that_are_no_sizes_are_refused(size: object) -> None:
    with pytest.raises(CorruptSnapshotError, match="lists the size"):
        require_size("model.bin", size)


def test_bounded_files_are_unchanged_below_the_limit() -> None:
    assert list(bounded_files(iter("abc"))) == ["a", "b", "c"]
