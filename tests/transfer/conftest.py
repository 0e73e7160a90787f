"""Fixtures of the transfers' tests: two hubs on this machine, and settings that point at them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from emb_model_provider.settings import Settings
from emb_model_provider.transfer.retry import RetryPolicy
from emb_model_provider.transfer.session import TransferOptions
from emb_model_provider.transfer.transfer import Transfer
from tests.hubs.conftest import home
from tests.transfer.helpers import SOURCE, TOKEN, model_files
from tests.transfer.servers import DestinationServer, SourceServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["home"]

# Read by the client when it is first imported: five retries of a GET take 15 s.
os.environ.setdefault("MODELSCOPE_API_MAX_RETRIES", "1")


@pytest.fixture
def source() -> Iterator[SourceServer]:
    with SourceServer({SOURCE: model_files()}) as server:
        yield server


@pytest.fixture
def destination() -> Iterator[DestinationServer]:
    with DestinationServer({}, token=TOKEN) as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path, source: SourceServer, destination: DestinationServer) -> Settings:
    return Settings.from_values(
        cache_dir=tmp_path / "cache",
        hf_endpoint=source.url,
        modelscope_endpoint=destination.url,
        hf_token=SecretStr("hf-s3cret"),
        modelscope_token=SecretStr(TOKEN),
    )


@pytest.fixture
def transfer(settings: Settings) -> Callable[..., Transfer]:
    """Return a function that makes a transfer with options, which retries soon."""

    def make(**options: object) -> Transfer:
        retry = RetryPolicy(first_wait_s=0.01)
        return Transfer(settings, TransferOptions(**{"retry": retry, **options}))

    return make
