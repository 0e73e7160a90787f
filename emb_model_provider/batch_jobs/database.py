"""Opens the database of batches, SQLite or PostgreSQL, and runs transactions in it."""

from __future__ import annotations

import logging
import sqlite3
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine, event, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from emb_model_provider.batch_jobs.pending import SQLITE_FILE
from emb_model_provider.errors import DatabaseUnavailableError, SettingsError, StorageFullError
from emb_model_provider.formatting import first_line
from emb_model_provider.snapshots.files import require_writable
from emb_model_provider.snapshots.locks import lock_exclusive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL, Connection, Engine

    Clock = Callable[[Connection], float]

REVISION = "0001"
"""The newest migration."""

_SETTING = "EMB_PROVIDER_DATABASE_URL"
_BUSY_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 10
_IDLE_TRANSACTION_S = 10
"""A transaction of PostgreSQL that does nothing for this long ends, so that a process that was stopped does not hold up others."""
_RETRY_AFTER_S = 5.0
_MIGRATION_LOCK = 0x656D625F6A6F6273
"""Key of PostgreSQL's advisory lock."""
_MIGRATIONS = Path(__file__).parent / "migrations"
_PRAGMAS = (
    f"PRAGMA busy_timeout = {int(1000 * _BUSY_TIMEOUT_S)}",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA foreign_keys = ON",
)


def open_database(url: str | None, directory: Path) -> Engine:
    """Open the database, and create or update its tables. Several processes can do so at the same time.

    Args:
        url: `postgresql://…`; None: SQLite, in a file in `directory`.
        directory: The directory of the batches, which is created.

    Raises:
        SettingsError: The URL is invalid, its driver is not installed, or a newer version has created the tables.
        DatabaseUnavailableError: The server does not respond or refuses the connection.
        CacheNotWritableError: The directory is not writable.
    """
    require_writable(directory, "EMB_PROVIDER_BATCH_DIR")
    engine = _open_sqlite(directory / SQLITE_FILE) if url is None else _open_postgresql(_parse(url))
    try:
        if url is None:
            # Also because two processes cannot change the journal mode at the same time.
            with lock_exclusive(directory / f".{SQLITE_FILE}.lock", timeout_s=_BUSY_TIMEOUT_S):
                _migrate(engine)
        else:
            _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Yield a connection. Its changes are committed together at the end, or rolled back after an error.

    Raises:
        DatabaseUnavailableError: The database does not respond.
        StorageFullError: The disk of the database is full.
    """
    with _translated(engine), engine.execution_options(writes=True).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {1000 * _IDLE_TRANSACTION_S}")
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Yield a connection that changes nothing. Raises the errors of `transaction`."""
    with _translated(engine), engine.connect() as connection:
        yield connection


def now(connection: Connection) -> float:
    """Return the Unix time in seconds, on a database server that of its clock, which all processes share."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())")) or 0.0)


def is_storable(text: str) -> bool:
    """Return whether PostgreSQL can store a text or compare columns with it. It has no NUL and no lone surrogates."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def _open_sqlite(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": _BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions; `begin` does
        for pragma in _PRAGMAS:
            connection.execute(pragma)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and then writes could fail, because another one wrote in between.
        is_writer = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")

    return engine


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        # The URL can contain a password, so that it is not quoted.
        raise SettingsError(
            f"{_SETTING} is no URL of a database. Set it to postgresql://USER:PASSWORD@HOST/DATABASE, or remove it for SQLite."
        ) from error
    if parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise SettingsError(
            f"{_SETTING} names the database {parsed.drivername!r}. Set it to postgresql://USER:PASSWORD@HOST/DATABASE, or "
            "remove it for SQLite."
        )
    return parsed.set(drivername="postgresql+psycopg")


def _open_postgresql(url: URL) -> Engine:
    # Servers that share connections between transactions (PgBouncer) have no prepared statements.
    arguments = {"connect_timeout": _CONNECT_TIMEOUT_S, "prepare_threshold": None, "application_name": "emb-provider"}
    try:
        return create_engine(url, connect_args=arguments, pool_pre_ping=True)
    except (ImportError, NoSuchModuleError) as error:
        raise SettingsError(
            f"{_SETTING} needs the driver psycopg. Install it: pip install 'emb-model-provider[postgresql]'."
        ) from error


def _migrate(engine: Engine) -> None:
    with reading(engine) as connection:
        if _revision(connection) == REVISION:
            return
    # Imported here, because most starts find the tables up to date.
    from alembic import command
    from alembic.config import Config

    with transaction(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(select(text(f"pg_advisory_xact_lock({_MIGRATION_LOCK})")))
        revision = _revision(connection)
        if revision is not None and revision > REVISION:
            raise SettingsError(
                f"The database {engine.url.render_as_string()} was created by a newer version of emb-model-provider (its "
                f"tables have revision {revision}, this version has {REVISION}). Update emb-model-provider."
            )
        logging.getLogger("alembic").setLevel(logging.WARNING)  # it reports each of its plugins
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        command.upgrade(config, REVISION)


def _revision(connection: Connection) -> str | None:
    """Return the revision of the tables; None if there are none."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


@contextmanager
def _translated(engine: Engine) -> Iterator[None]:
    try:
        yield
    except PoolTimeoutError as error:
        raise DatabaseUnavailableError(
            "All connections to the database of batches are in use. Try again later.", retry_after_s=_RETRY_AFTER_S
        ) from error
    except DBAPIError as error:
        cause = error.orig
        if isinstance(cause, sqlite3.Error) and _is_full(cause):
            raise StorageFullError(
                f"The disk of the database {engine.url.database} is full. Free some space."
            ) from error
        if not (error.connection_invalidated or type(error).__name__ in ("OperationalError", "InterfaceError")):
            raise
        raise DatabaseUnavailableError(
            f"The database {engine.url.render_as_string()} does not respond: {first_line(cause or error)}.",
            retry_after_s=_RETRY_AFTER_S,
        ) from error


def _is_full(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
