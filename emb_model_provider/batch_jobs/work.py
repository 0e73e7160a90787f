"""The work of batches in the database: leases with fencing numbers, and the changes of state that workers make.

A worker leases a chunk, or a batch that is to be validated or finalized. Each lease has a new fencing number, and each
result is accepted only if the number is still that of its lease. So a worker that lost its lease, because it was stopped for a
while or its connection broke, cannot change what another worker has done. Transactions lock a batch before its chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from emb_model_provider.batch_jobs.batches import LineError, dump_errors, find_batch
from emb_model_provider.batch_jobs.database import reading, transaction
from emb_model_provider.batch_jobs.lines import Chunk
from emb_model_provider.batch_jobs.segments import Segment
from emb_model_provider.batch_jobs.tables import batches, chunks
from emb_model_provider.batch_jobs.types import UNFINISHED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Connection

    from emb_model_provider.batch_jobs.batches import Batch, BatchStore
    from emb_model_provider.batch_jobs.files import StoredFile
    from emb_model_provider.batch_jobs.lines import Validation


@dataclass(frozen=True, slots=True, eq=False)
class BatchLease:
    """The right to validate or finalize a batch."""

    batch: Batch
    input_sha256: str
    outcome: str
    """The state after finalizing."""
    output_expires_after_s: int | None
    fence: int

    @property
    def batch_id(self) -> str:
        return self.batch.id


@dataclass(frozen=True, slots=True, eq=False)
class ChunkLease:
    """The right to compute a chunk."""

    batch: Batch
    input_sha256: str
    seq: int
    chunk: Chunk
    fence: int
    crashes: int
    """Earlier leases that ended without a result and were not returned, because the process ended."""
    kept: Results | None
    """Lines that were computed by an earlier lease."""

    @property
    def batch_id(self) -> str:
        return self.batch.id


@dataclass(frozen=True, slots=True)
class Results:
    """The results of a chunk, or of a part of its lines."""

    segment: Segment
    completed: int
    failed: int
    tokens: int

    def plus(self, kept: Results) -> Results:
        """Return the results with the counts of others that are in the same segment."""
        return Results(
            self.segment, self.completed + kept.completed, self.failed + kept.failed, self.tokens + kept.tokens
        )


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """A chunk of a batch that is being finalized."""

    seq: int
    chunk: Chunk
    is_done: bool
    results: Results | None
    """None: no line was computed."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What a batch gets when it ends, in addition to its chunks that are done."""

    output: StoredFile | None
    """None: no line succeeded."""
    errors: StoredFile | None
    """None: no line failed."""
    completed: int = 0
    """Lines of chunks that are not done."""
    failed: int = 0
    tokens: int = 0


Lease = BatchLease | ChunkLease

_NO_LEASE: dict[str, Any] = {"holder": "", "leased_until": 0.0}
"""Without a holder, because a renewal that is in progress must not extend a lease that has ended."""


class WorkStore:
    """The operations of one worker. Thread-safe."""

    def __init__(self, batch_store: BatchStore, holder: str, instance: str, lease_s: float) -> None:
        """Create the store of a worker.

        Args:
            batch_store: The batches.
            holder: Name of the worker, which no other living worker has. The worker takes over the leases of an earlier
                process of this name at once.
            instance: Different for each process of this name.
            lease_s: Duration of a lease, in seconds.
        """
        self._engine = batch_store.engine
        self._clock = batch_store.clock
        self._prefix = f"{holder}/"
        self._holder = f"{holder}/{instance}"
        self._lease_s = lease_s

    # --- leases ---------------------------------------------------------------------------------------

    def claim(self) -> Lease | None:
        """Lease the most urgent work: a batch to finalize, one to validate, a chunk. None: there is none."""
        with reading(self._engine) as connection:
            if not self._find_candidates(connection):
                return None
        with transaction(self._engine) as connection:
            current = self._clock(connection)
            return self._claim_batch(connection, current) or self._claim_chunk(connection, current)

    def renew(self, leases: Sequence[Lease]) -> list[Lease]:
        """Extend leases, and return those that are lost: to another worker, or because the batch was cancelled or expired."""
        lost: list[Lease] = []
        with transaction(self._engine) as connection:
            values = {"leased_until": self._clock(connection) + self._lease_s}
            running = sa.select(batches.c.id).where(batches.c.state == "in_progress")
            for lease in sorted(leases, key=lambda each: isinstance(each, ChunkLease)):
                query = self._update(lease).values(values)
                if isinstance(lease, ChunkLease):
                    query = query.where(chunks.c.done == 0, chunks.c.batch_id.in_(running))
                if connection.execute(query).rowcount == 0:
                    lost.append(lease)
        return lost

    def has_ended(self, lease: ChunkLease) -> bool:
        """Return whether a lease is lost because its batch was cancelled or expired. Its results can still be kept."""
        query = sa.select(chunks.c.seq).where(
            *_key(lease), chunks.c.fence == lease.fence, chunks.c.holder == self._holder, chunks.c.done == 0
        )
        with reading(self._engine) as connection:
            return connection.scalar(query) is not None

    def release(self, lease: Lease, wait_s: float = 0.0) -> None:
        """End a lease without a result. The work is not leased again for `wait_s` seconds."""
        with transaction(self._engine) as connection:
            not_before = self._clock(connection) + wait_s if wait_s else 0.0
            connection.execute(self._update(lease).values(**_NO_LEASE, not_before=not_before))

    def pause(self, batch_id: str, reason: str | None) -> None:
        """Set why a batch makes no progress; None: it makes progress. Other workers may have ended it meanwhile."""
        changed = batches.c.pause_reason.is_distinct_from(reason), batches.c.state.in_(UNFINISHED)
        with transaction(self._engine) as connection:
            connection.execute(sa.update(batches).where(batches.c.id == batch_id, *changed).values(pause_reason=reason))

    # --- results --------------------------------------------------------------------------------------

    def validated(self, lease: BatchLease, result: Validation) -> bool:
        """Begin to compute a batch, or let it fail. Returns whether the lease was still valid."""
        with transaction(self._engine) as connection:
            if not self._holds(connection, lease, "validating"):
                return False
            current = self._clock(connection)
            if result.errors:
                self._end(connection, lease, "failed", current, errors=dump_errors(result.errors))
                return True
            values = [
                {
                    "batch_id": lease.batch_id,
                    "seq": seq,
                    "offset": chunk.offset,
                    "bytes": chunk.bytes,
                    "first_line": chunk.first_line,
                    "lines": chunk.lines,
                    "fence": 0,
                    "holder": "",
                    "leased_at": 0.0,
                    "leased_until": 0.0,
                    "not_before": 0.0,
                    "crashes": 0,
                    "done": 0,
                }
                for seq, chunk in enumerate(result.chunks)
            ]
            connection.execute(sa.insert(chunks), values)
            self._change(
                connection,
                lease.batch_id,
                state="in_progress",
                in_progress_at=current,
                total=result.lines,
                model=result.model,
                pause_reason=None,
                **_NO_LEASE,
            )
            return True

    def keep(self, lease: ChunkLease, results: Results, wait_s: float = 0.0) -> bool:
        """End the lease of a chunk of which some lines have no result, also if its batch was cancelled or expired.

        It can be called again if its success is unknown.

        Args:
            lease: The lease.
            results: All results so far.
            wait_s: For how many seconds the chunk is not leased again.

        Returns:
            Whether the segment is recorded.
        """
        with transaction(self._engine) as connection:
            find_batch(connection, None, lease.batch_id, lock=True)
            query = sa.select(chunks).where(*_key(lease))
            row = connection.execute(query.with_for_update()).one_or_none()
            if row is not None and row.segment == results.segment.name:
                return True
            if row is None or (row.fence, row.holder, row.done) != (lease.fence, self._holder, 0):
                return False
            not_before = self._clock(connection) + wait_s if wait_s else 0.0
            values = _results_values(results) | _NO_LEASE | {"not_before": not_before}
            connection.execute(self._update(lease).values(values))
            return True

    def done(self, lease: ChunkLease, results: Results) -> bool:
        """Record the segment of a chunk, and finalize the batch after its last one.

        It can be called again if its success is unknown. Returns whether the segment is recorded.
        """
        with transaction(self._engine) as connection:
            batch = find_batch(connection, None, lease.batch_id, lock=True)
            query = sa.select(chunks.c.fence, chunks.c.holder, chunks.c.done, chunks.c.segment).where(*_key(lease))
            row = connection.execute(query.with_for_update()).one_or_none()
            if row is None or row.fence != lease.fence:
                return False
            if row.done:
                return bool(row.segment == results.segment.name)
            if batch.state != "in_progress" or row.holder != self._holder:
                return False
            connection.execute(self._update(lease).values(done=1, **_results_values(results), **_NO_LEASE))
            left = sa.select(chunks.c.seq).where(chunks.c.batch_id == lease.batch_id, chunks.c.done == 0).limit(1)
            is_last = connection.scalar(left) is None
            self._change(
                connection,
                lease.batch_id,
                completed=batches.c.completed + results.completed,
                failed=batches.c.failed + results.failed,
                tokens=batches.c.tokens + results.tokens,
                pause_reason=None,
                **({"state": "finalizing", "finalizing_at": self._clock(connection)} if is_last else {}),
            )
            return True

    def results(self, lease: BatchLease) -> list[ChunkResult]:
        """Return the chunks of a batch that is being finalized, in order."""
        query = sa.select(chunks).where(chunks.c.batch_id == lease.batch_id).order_by(chunks.c.seq)
        with reading(self._engine) as connection:
            return [
                ChunkResult(row.seq, _chunk(row), bool(row.done), _results(row)) for row in connection.execute(query)
            ]

    def discard(self, lease: BatchLease, seq: int) -> None:
        """Forget the segment of a chunk, which is damaged. A batch that has not expired computes the chunk again."""
        with transaction(self._engine) as connection:
            batch = find_batch(connection, None, lease.batch_id, lock=True)
            if not self._holds(connection, lease, batch.state):
                return
            where = (chunks.c.batch_id == lease.batch_id, chunks.c.seq == seq)
            row = connection.execute(sa.select(chunks).where(*where)).one()
            connection.execute(
                sa.update(chunks).where(*where).values(done=0, fence=chunks.c.fence + 1, segment=None, leased_until=0.0)
            )
            self._change(
                connection,
                lease.batch_id,
                completed=batches.c.completed - row.completed,
                failed=batches.c.failed - row.failed,
                tokens=batches.c.tokens - row.tokens,
                **_NO_LEASE,
                **(
                    {"state": "in_progress", "finalizing_at": None}
                    if (batch.state, lease.outcome) == ("finalizing", "completed")
                    else {}
                ),
            )

    def finalized(self, lease: BatchLease, record: Callable[[Connection, StoredFile], None], ending: Ending) -> bool:
        """End a batch with its files. It can be called again if its success is unknown.

        Args:
            lease: The lease.
            record: Adds the row of a file.
            ending: The files, and the lines that are not yet counted.

        Returns:
            Whether the batch has ended with these files.
        """
        with transaction(self._engine) as connection:
            batch = find_batch(connection, None, lease.batch_id, lock=True)
            ids = tuple(file.id if file is not None else None for file in (ending.output, ending.errors))
            if batch.state not in UNFINISHED:
                return (batch.output_file_id, batch.error_file_id) == ids
            if not self._holds(connection, lease, lease.batch.state):
                return False
            for file in (ending.output, ending.errors):
                if file is not None:
                    record(connection, file)
            connection.execute(sa.delete(chunks).where(chunks.c.batch_id == lease.batch_id))
            self._end(
                connection,
                lease,
                "cancelled" if batch.state == "cancelling" else lease.outcome,
                self._clock(connection),
                output_file_id=ids[0],
                error_file_id=ids[1],
                completed=batches.c.completed + ending.completed,
                failed=batches.c.failed + ending.failed,
                tokens=batches.c.tokens + ending.tokens,
            )
            return True

    def expire(self) -> None:
        """End the batches that have reached the end of their completion window."""
        with reading(self._engine) as connection:
            due = batches.c.expires_at <= self._clock(connection)
            running = batches.c.state.in_(("validating", "in_progress"))
            if connection.scalar(sa.select(batches.c.id).where(running, due).limit(1)) is None:
                return
        with transaction(self._engine) as connection:
            current = self._clock(connection)
            ended = {"fence": batches.c.fence + 1, "leased_until": 0.0, "not_before": 0.0}
            # A batch without chunks has no files.
            error = LineError("batch_expired", "The input file was not validated before the completion window expired.")
            unvalidated = {
                "state": "expired",
                "expired_at": current,
                "errors": dump_errors([error]),
                "pause_reason": None,
            }
            unfinished = {"state": "finalizing", "finalizing_at": current, "outcome": "expired"}
            for state, values in (("validating", unvalidated), ("in_progress", unfinished)):
                query = sa.update(batches).where(batches.c.state == state, due)
                connection.execute(query.values(ended | values))

    def now(self) -> float:
        """Return the time of the database."""
        with reading(self._engine) as connection:
            return self._clock(connection)

    def unfinished(self) -> list[str]:
        """Return the ids of all batches that have not ended."""
        with reading(self._engine) as connection:
            return list(connection.scalars(sa.select(batches.c.id).where(batches.c.state.in_(UNFINISHED))))

    # --- private --------------------------------------------------------------------------------------

    def _free(self, table: sa.Table, current: float) -> list[sa.ColumnElement[bool]]:
        """Return the conditions that no process holds a lease, or only an earlier process of this worker."""
        return [sa.not_(self._is_leased(table, current)), table.c.not_before <= current]

    def _is_leased(self, table: sa.Table, current: float) -> sa.ColumnElement[bool]:
        own = sa.and_(table.c.holder.startswith(self._prefix, autoescape=True), table.c.holder != self._holder)
        return sa.and_(table.c.leased_until > current, sa.not_(own))

    def _find_candidates(self, connection: Connection) -> bool:
        """Return whether there may be work, without locking anything."""
        current = self._clock(connection)
        of_batch = sa.select(batches.c.id).where(*self._to_lease(current)).limit(1)
        if connection.scalar(of_batch) is not None:
            return True
        return bool(self._batches_with_chunks(connection, current))

    def _to_lease(self, current: float) -> list[sa.ColumnElement[bool]]:
        """Return the conditions of the batches to validate or finalize.

        A batch that was cancelled or has expired waits until its chunks in progress are returned, or their leases end.
        """
        computing = sa.exists().where(
            chunks.c.batch_id == batches.c.id, chunks.c.done == 0, self._is_leased(chunks, current)
        )
        return [
            batches.c.state.in_(("finalizing", "cancelling", "validating")),
            *self._free(batches, current),
            sa.not_(computing),
        ]

    def _claim_batch(self, connection: Connection, current: float) -> BatchLease | None:
        query = sa.select(batches).where(*self._to_lease(current))
        # Batches that end come first, because they need the least time.
        query = query.order_by(batches.c.state == "validating", batches.c.created_at).limit(1)
        row = connection.execute(query.with_for_update(skip_locked=True)).one_or_none()
        if row is None:
            return None
        fence = row.fence + 1
        self._change(connection, row.id, fence=fence, holder=self._holder, leased_until=current + self._lease_s)
        # From now on, a worker whose lease has ended cannot add results, because they would be in no file.
        unfinished = sa.update(chunks).where(chunks.c.batch_id == row.id, chunks.c.done == 0)
        connection.execute(unfinished.values(fence=chunks.c.fence + 1, **_NO_LEASE))
        batch = find_batch(connection, None, row.id)
        return BatchLease(batch, row.input_sha256, row.outcome, row.output_expires_after_s, fence)

    def _batches_with_chunks(self, connection: Connection, current: float) -> Sequence[str]:
        """Return the batches with chunks to compute, first the one of which a chunk was leased least recently."""
        query = (
            sa.select(chunks.c.batch_id)
            .join(batches, batches.c.id == chunks.c.batch_id)
            .where(batches.c.state == "in_progress", chunks.c.done == 0, *self._free(chunks, current))
            .distinct()
        )
        ready = connection.scalars(query).all()
        if len(ready) < 2:
            return ready
        last = (
            sa.select(chunks.c.batch_id)
            .where(chunks.c.batch_id.in_(ready))
            .group_by(chunks.c.batch_id)
            .order_by(sa.func.max(chunks.c.leased_at), chunks.c.batch_id)
        )
        return connection.scalars(last).all()

    def _claim_chunk(self, connection: Connection, current: float) -> ChunkLease | None:
        for batch_id in self._batches_with_chunks(connection, current):
            # Shared, so that several workers lease chunks at the same time, but the state stays.
            query = sa.select(batches.c.state, batches.c.input_sha256).where(batches.c.id == batch_id)
            row = connection.execute(query.with_for_update(read=True)).one()
            if row.state != "in_progress":
                continue
            query = sa.select(chunks).where(
                chunks.c.batch_id == batch_id, chunks.c.done == 0, *self._free(chunks, current)
            )
            found = connection.execute(
                query.order_by(chunks.c.seq).limit(1).with_for_update(skip_locked=True)
            ).one_or_none()
            if found is None:
                continue
            batch = find_batch(connection, None, batch_id)
            # A lease that was returned has no holder.
            crashes = found.crashes + (found.holder != "")
            chunk, kept = _chunk(found), _results(found)
            lease = ChunkLease(batch, row.input_sha256, found.seq, chunk, found.fence + 1, crashes, kept)
            values = {
                "fence": lease.fence,
                "crashes": crashes,
                "holder": self._holder,
                "leased_at": current,
                "leased_until": current + self._lease_s,
            }
            connection.execute(sa.update(chunks).where(*_key(lease)).values(values))
            return lease
        return None

    def _update(self, lease: Lease) -> sa.Update:
        """Return an update of the row of a lease, which does nothing if the lease is lost or was released."""
        table, key = (
            (chunks, _key(lease)) if isinstance(lease, ChunkLease) else (batches, (batches.c.id == lease.batch_id,))
        )
        return sa.update(table).where(*key, table.c.fence == lease.fence, table.c.holder == self._holder)

    def _holds(self, connection: Connection, lease: BatchLease, state: str) -> bool:
        query = sa.select(batches.c.fence, batches.c.holder, batches.c.state).where(batches.c.id == lease.batch_id)
        row = connection.execute(query.with_for_update()).one()
        return (row.fence, row.holder, row.state) == (lease.fence, self._holder, state)

    def _end(self, connection: Connection, lease: BatchLease, state: str, current: float, **values: object) -> None:
        ended = {"state": state, f"{state}_at": current, "pause_reason": None, **_NO_LEASE}
        self._change(connection, lease.batch_id, **ended | values)

    def _change(self, connection: Connection, batch_id: str, **values: object) -> None:
        connection.execute(sa.update(batches).where(batches.c.id == batch_id).values(values))


def _key(lease: ChunkLease) -> tuple[sa.ColumnElement[bool], ...]:
    return chunks.c.batch_id == lease.batch_id, chunks.c.seq == lease.seq


def _results_values(results: Results) -> dict[str, Any]:
    return {
        "segment": results.segment.name,
        "segment_sha256": results.segment.sha256,
        "output_bytes": results.segment.output_bytes,
        "completed": results.completed,
        "failed": results.failed,
        "tokens": results.tokens,
    }


def _results(row: Any) -> Results | None:
    """Return the results of a row of the table of chunks."""
    if row.segment is None:
        return None
    segment = Segment(row.segment, row.segment_sha256, row.output_bytes)
    return Results(segment, row.completed, row.failed, row.tokens)


def _chunk(row: Any) -> Chunk:
    return Chunk(row.offset, row.bytes, row.first_line, row.lines)
