"""Finds out whether a service that starts has batches to continue, without importing the library of the database."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING

from emb_model_provider.batch_jobs.types import UNFINISHED

if TYPE_CHECKING:
    from pathlib import Path

SQLITE_FILE = "batch.sqlite3"

_QUERY = f"SELECT 1 FROM batches WHERE state IN ({', '.join('?' * len(UNFINISHED))}) LIMIT 1"  # noqa: S608 - question marks


def has_unfinished_batches(directory: Path) -> bool:
    """Return whether the SQLite database in `directory` has batches that have not ended. False if there is none.

    A database that cannot be read counts as one with such batches, so that the worker reports why.
    """
    path = directory / SQLITE_FILE
    if not path.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as connection:
            return connection.execute(_QUERY, UNFINISHED).fetchone() is not None
    except sqlite3.Error:
        return True
