"""Batches: how clients create, read and cancel them. `work.py` has the operations of the workers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import sqlalchemy as sa

from emb_model_provider.batch_jobs.database import is_storable, now, reading, transaction
from emb_model_provider.batch_jobs.files import INPUT, new_id
from emb_model_provider.batch_jobs.tables import batches
from emb_model_provider.batch_jobs.types import COMPLETION_WINDOWS, ENDPOINTS, UNFINISHED, BatchState, Page
from emb_model_provider.errors import RequestError, StateConflictError, TooManyBatchesError, UnknownBatchError
from emb_model_provider.formatting import quote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Connection, Engine, Row

    from emb_model_provider.batch_jobs.database import Clock
    from emb_model_provider.batch_jobs.files import FileStore

_MAX_PAIRS, _MAX_KEY, _MAX_VALUE = 16, 64, 512
"""Limits of metadata, in pairs and characters."""
_RETRY_AFTER_S = 60.0
_CREATE_LOCK = 0x656D6270
"""First key of PostgreSQL's advisory locks; the second one is that of an owner."""
_REMOVED_TOGETHER = 500
"""Batches that are deleted in a transaction."""


@dataclass(frozen=True, slots=True)
class LineError:
    """Why a batch failed."""

    code: str
    message: str
    line: int | None = None
    """Line of the input file, from 1; None: it concerns the whole file."""
    param: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch. Times are Unix times in seconds; None: the state was not reached."""

    id: str
    owner: str
    """Name of the API key; "" without keys."""
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: Mapping[str, str] | None
    model: str | None
    """The model of the first line; None before the file is validated."""
    state: BatchState
    errors: tuple[LineError, ...]
    created_at: float
    expires_at: float
    in_progress_at: float | None
    finalizing_at: float | None
    completed_at: float | None
    failed_at: float | None
    expired_at: float | None
    cancelling_at: float | None
    cancelled_at: float | None
    total: int
    """Lines of the input file; 0 before it is validated."""
    completed: int
    failed: int
    tokens: int
    output_file_id: str | None
    error_file_id: str | None
    pause_reason: str | None
    """Why the batch makes no progress at present, for example because the disk is full."""


@dataclass(frozen=True, slots=True)
class BatchFigures:
    """Sums over all batches."""

    states: Mapping[str, int]
    """Number of batches by state, without states that none has."""
    completed: int
    """Lines."""
    failed: int


class BatchStore:
    """The table of batches. Thread-safe. `owner` is as in `FileStore`."""

    def __init__(self, engine: Engine, files: FileStore, *, max_unfinished: int = 0, clock: Clock = now) -> None:
        """Create a store.

        Args:
            engine: The opened database.
            files: The files.
            max_unfinished: How many batches of an owner may not have ended; 0: no limit.
            clock: Returns the Unix time in seconds.
        """
        self.engine = engine
        self.files = files
        self.max_unfinished = max_unfinished
        self.clock = clock

    def create(
        self,
        owner: str,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        output_expires_after_s: int | None = None,
    ) -> Batch:
        """Create a batch in the state `validating`.

        Raises:
            RequestError: A field is invalid.
            UnknownFileError: The file does not exist.
            TooManyBatchesError: The owner has `max_unfinished` batches.
        """
        if endpoint not in ENDPOINTS:
            raise _invalid("endpoint", endpoint, ENDPOINTS)
        if completion_window not in COMPLETION_WINDOWS:
            raise _invalid("completion_window", completion_window, tuple(COMPLETION_WINDOWS))
        _check_metadata(metadata)
        with transaction(self.engine) as connection:
            file = self.files.find(connection, owner, input_file_id, param="input_file_id", lock="share")
            if file.purpose != INPUT:
                raise RequestError(
                    f"The purpose of the file {file.id} is '{file.purpose}'. Upload the requests with the purpose '{INPUT}'.",
                    param="input_file_id",
                )
            self._check_number(connection, owner)
            created = self.clock(connection)
            batch_id = new_id("batch")
            values = {
                "id": batch_id,
                "owner": owner,
                "endpoint": endpoint,
                "input_file_id": file.id,
                "input_sha256": file.sha256,
                "completion_window": completion_window,
                # In ASCII, because PostgreSQL stores neither NUL nor lone surrogates.
                "metadata": json.dumps(dict(metadata)) if metadata is not None else None,
                "output_expires_after_s": output_expires_after_s,
                "state": "validating",
                "outcome": "completed",
                "created_at": created,
                "expires_at": created + COMPLETION_WINDOWS[completion_window],
                **dict.fromkeys(("total", "completed", "failed", "tokens", "fence"), 0),
                "holder": "",
                "leased_until": 0.0,
                "not_before": 0.0,
            }
            connection.execute(sa.insert(batches).values(values))
            return find_batch(connection, owner, batch_id)

    def get(self, owner: str | None, batch_id: str) -> Batch:
        """Return a batch.

        Raises:
            UnknownBatchError: It does not exist, or it belongs to another owner.
        """
        with reading(self.engine) as connection:
            return find_batch(connection, owner, batch_id)

    def list(self, owner: str | None, *, after: str | None = None, limit: int = 20) -> Page[Batch]:
        """Return up to `limit` batches, the newest first, those after the batch `after`.

        Raises:
            UnknownBatchError: `after` is no batch.
        """
        query = sa.select(batches)
        if owner is not None:
            query = query.where(batches.c.owner == owner)
        with reading(self.engine) as connection:
            if after is not None:
                last = find_batch(connection, owner, after)
                position = sa.tuple_(sa.literal(last.created_at), sa.literal(last.id))
                query = query.where(sa.tuple_(batches.c.created_at, batches.c.id) < position)
            query = query.order_by(batches.c.created_at.desc(), batches.c.id.desc()).limit(limit + 1)
            rows = connection.execute(query).all()
        return Page(tuple(_batch(row) for row in rows[:limit]), len(rows) > limit)

    def cancel(self, owner: str | None, batch_id: str) -> Batch:
        """Cancel a batch. A worker then writes the lines that are done to its files.

        Raises:
            UnknownBatchError: It does not exist.
            StateConflictError: It has already ended.
        """
        with transaction(self.engine) as connection:
            batch = find_batch(connection, owner, batch_id, lock=True)
            if batch.state not in UNFINISHED:
                raise StateConflictError(f"Cannot cancel a batch with status '{batch.state}'.", param="id")
            if batch.state == "cancelling":
                return batch
            # The lease of a worker that validates or finalizes the batch ends.
            values = {
                "state": "cancelling",
                "cancelling_at": self.clock(connection),
                "fence": batches.c.fence + 1,
                "leased_until": 0.0,
                "not_before": 0.0,
            }
            connection.execute(sa.update(batches).where(batches.c.id == batch_id).values(values))
            return find_batch(connection, owner, batch_id)

    def remove_ended(self, retention_s: float) -> int:
        """Delete batches that ended `retention_s` seconds ago, with their files. Returns their number.

        Input files that another batch also reads are kept.
        """
        ended_at = sa.func.coalesce(
            batches.c.completed_at, batches.c.failed_at, batches.c.expired_at, batches.c.cancelled_at
        )
        columns = (batches.c.id, batches.c.input_file_id, batches.c.output_file_id, batches.c.error_file_id)
        count = 0
        while True:
            with transaction(self.engine) as connection:
                is_over = ended_at <= self.clock(connection) - retention_s
                query = sa.select(*columns).where(batches.c.state.not_in(UNFINISHED), is_over).limit(_REMOVED_TOGETHER)
                rows = connection.execute(query).all()
                if not rows:
                    return count
                connection.execute(sa.delete(batches).where(batches.c.id.in_([row.id for row in rows])))
                inputs = {row.input_file_id for row in rows}
                self.files.lock_rows(connection, inputs)
                used = connection.scalars(
                    sa.select(batches.c.input_file_id).where(batches.c.input_file_id.in_(inputs))
                ).all()
                results = {each for row in rows for each in (row.output_file_id, row.error_file_id) if each is not None}
                file_ids = results | inputs.difference(used)
                self.files.remove_rows(connection, file_ids)
            # After the commit, so that each row has its content. After a crash, they are files without a row.
            self.files.remove_content(file_ids)
            count += len(rows)

    def has_unfinished(self) -> bool:
        """Return whether a worker has something to do."""
        with reading(self.engine) as connection:
            query = sa.select(batches.c.id).where(batches.c.state.in_(UNFINISHED)).limit(1)
            return connection.scalar(query) is not None

    def figures(self) -> BatchFigures:
        """Return the sums over all batches."""
        columns = (sa.func.count(), sa.func.sum(batches.c.completed), sa.func.sum(batches.c.failed))
        with reading(self.engine) as connection:
            rows = connection.execute(sa.select(batches.c.state, *columns).group_by(batches.c.state)).all()
        return BatchFigures({row[0]: row[1] for row in rows}, sum(row[2] for row in rows), sum(row[3] for row in rows))

    def _check_number(self, connection: Connection, owner: str) -> None:
        if not self.max_unfinished:
            return
        if connection.dialect.name == "postgresql":  # one at a time, as with SQLite
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CREATE_LOCK, sa.func.hashtext(owner))))
        query = sa.select(sa.func.count()).where(batches.c.owner == owner, batches.c.state.in_(UNFINISHED))
        if (count := connection.scalar(query) or 0) >= self.max_unfinished:
            raise TooManyBatchesError(
                f"You have {count} batches that have not ended, and the limit is {self.max_unfinished}. Create the batch again "
                "when one of them has ended, cancel one, or ask the operator to raise "
                "EMB_PROVIDER_MAX_UNFINISHED_BATCHES.",
                retry_after_s=_RETRY_AFTER_S,
            )


def find_batch(connection: Connection, owner: str | None, batch_id: str, *, lock: bool = False) -> Batch:
    """Return a batch within a transaction, with `lock` until its end, else raise UnknownBatchError."""
    query = sa.select(batches).where(batches.c.id == batch_id)
    if owner is not None:
        query = query.where(batches.c.owner == owner)
    query = query.with_for_update() if lock else query
    row = connection.execute(query).one_or_none() if is_storable(batch_id) else None
    if row is None:
        raise UnknownBatchError(batch_id)
    return _batch(row)


def dump_errors(errors: Sequence[LineError]) -> str:
    """Return the value of the column `errors`."""
    return json.dumps([asdict(error) for error in errors])


def _batch(row: Row[Any]) -> Batch:
    values = {name: row._mapping[name] for name in (field.name for field in fields(Batch))}
    metadata, errors = values["metadata"], values["errors"]
    values["metadata"] = cast("dict[str, str]", json.loads(metadata)) if metadata is not None else None
    values["errors"] = tuple(LineError(**error) for error in json.loads(errors or "[]"))
    return Batch(**values)


def _invalid(param: str, value: object, allowed: Sequence[str]) -> RequestError:
    names = ", ".join(f"'{each}'" for each in allowed)
    return RequestError(f"Invalid value for '{param}' = {quote(value)}. Supported values: {names}.", param=param)


def _check_metadata(metadata: Mapping[str, str] | None) -> None:
    if metadata is None:
        return
    if len(metadata) > _MAX_PAIRS:
        raise RequestError(f"'metadata' has {len(metadata)} pairs, at most {_MAX_PAIRS} are allowed.", param="metadata")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str) or len(key) > _MAX_KEY or len(value) > _MAX_VALUE:
            raise RequestError(
                f"Invalid pair in 'metadata': {quote(key)}. Keys are strings of up to {_MAX_KEY} characters, values of up to "
                f"{_MAX_VALUE}.",
                param="metadata",
            )
