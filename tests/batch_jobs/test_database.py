"""The database has its tables after it is opened, and problems with it have clear messages."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from emb_model_provider.batch_jobs import database
from emb_model_provider.batch_jobs.database import REVISION, open_database, reading, transaction
from emb_model_provider.batch_jobs.pending import has_unfinished_batches
from emb_model_provider.batch_jobs.tables import metadata
from emb_model_provider.errors import DatabaseUnavailableError, SettingsError, StorageFullError
from tests.batch_jobs.helpers import lines
from tests.service import free_port

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Engine

    from tests.batch_jobs.helpers import Jobs


def test_migrations_create_the_tables(engine: Engine) -> None:
    with reading(engine) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_the_newest_migration_is_applied() -> None:
    scripts = ScriptDirectory(str(database._MIGRATIONS))
    assert scripts.get_heads() == [REVISION]


def test_processes_that_start_together(url: str | None, tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from emb_model_provider.batch_jobs.database import open_database\n"
        "sys.stdin.readline()\n"
        "open_database(sys.argv[2] or None, pathlib.Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), url or ""]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate(b"\n", timeout=120)[1] for process in processes] == [b""] * 3
    assert [process.returncode for process in processes] == [0] * 3


def test_tables_of_a_newer_version(engine: Engine, url: str | None, tmp_path: Path) -> None:
    with transaction(engine) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SettingsError, match="newer version of emb-model-provider"):
        open_database(url, tmp_path)


def test_settings_of_sqlite(tmp_path: Path) -> None:
    """A committed transaction survives a crash of the machine."""
    engine = open_database(None, tmp_path)
    with reading(engine) as connection:
        values = [
            connection.scalar(sa.text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    engine.dispose()
    assert values == ["wal", 2, 1]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "is no URL of a database"),
        ("postgresql://u:secret@host:port/x", "is no URL of a database"),
        ("mysql://u:secret@host/x", "names the database 'mysql'"),
    ],
)
def test_invalid_urls(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        open_database(url, tmp_path)
    assert "secret" not in caught.value.message


def test_a_server_that_does_not_respond(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnavailableError, match="does not respond") as caught:
        open_database(f"postgresql://u:secret@127.0.0.1:{free_port()}/x", tmp_path)
    assert "secret" not in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_process_that_is_stopped_in_a_transaction(
    engine: Engine, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL ends the transaction, so that others continue. The process gets an error that can pass."""
    monkeypatch.setattr(database, "_IDLE_TRANSACTION_S", 1)
    change = sa.text("UPDATE alembic_version SET version_num = version_num")
    other = open_database(url, tmp_path)

    def stop_in_a_transaction() -> None:
        with transaction(engine) as stopped:
            stopped.execute(change)
            with transaction(other) as connection:
                connection.execute(change)
            stopped.execute(change)

    with pytest.raises(DatabaseUnavailableError, match="idle-in-transaction"):
        stop_in_a_transaction()
    other.dispose()
    with transaction(engine) as connection:
        connection.execute(change)


def test_a_full_database(tmp_path: Path) -> None:
    engine = open_database(None, tmp_path)
    with transaction(engine) as connection:
        connection.execute(sa.text("CREATE TABLE large (x)"))
        connection.execute(sa.text("PRAGMA max_page_count = 20"))
    with pytest.raises(StorageFullError, match="is full"), transaction(engine) as connection:
        connection.execute(sa.text("INSERT INTO large VALUES (zeroblob(1000000))"))
    engine.dispose()


def test_a_start_without_batches_imports_no_database(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from emb_model_provider.batch_jobs.pending import has_unfinished_batches\n"
        "print(has_unfinished_batches(pathlib.Path(sys.argv[1])), {'sqlalchemy', 'alembic'} & sys.modules.keys())\n"
    )
    output = subprocess.check_output([sys.executable, "-c", program, str(tmp_path)], text=True)
    assert output == "False set()\n"


@pytest.mark.parametrize("url", [None], ids=["sqlite"])
def test_unfinished_batches_are_found_at_the_start(jobs: Jobs) -> None:
    assert not has_unfinished_batches(jobs.directory)
    jobs.create(lines(1))
    assert has_unfinished_batches(jobs.directory)
