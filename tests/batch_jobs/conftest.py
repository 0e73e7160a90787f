"""Databases and stores of the tests of batches."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.postgresql import PostgreSQL, programs
from emb_model_provider.batch_jobs.database import open_database
from tests.batch_jobs.helpers import Jobs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """Yield a server that all tests share."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed")
    # Not in the directory of pytest, which the user of the server cannot enter.
    with tempfile.TemporaryDirectory(prefix="tests-postgresql-") as directory:
        Path(directory).chmod(0o755)
        with PostgreSQL(Path(directory) / "data") as server:
            yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str | None:
    """Return the URL of a database without tables; None for SQLite."""
    if request.param == "sqlite":
        return None
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return server.create_schema()


@pytest.fixture
def engine(url: str | None, tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(url, tmp_path)
    yield engine
    engine.dispose()


@pytest.fixture
def jobs(engine: Engine, tmp_path: Path) -> Jobs:
    return Jobs(engine, tmp_path)
