"""The tables of the database. `migrations/` creates them. Times are Unix times in seconds."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Index, Integer, MetaData, Table, Text

metadata = MetaData()

files = Table(
    "files",
    metadata,
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False),  # the name of the API key, "" without keys
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Index("files_by_owner", "owner", "created_at", "id"),
    Index("files_by_expiry", "expires_at"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", Text, nullable=False),  # of a file that can be deleted when the batch has ended
    Column("input_sha256", Text, nullable=False),
    Column("completion_window", Text, nullable=False),
    Column("metadata", Text),  # JSON
    Column("output_expires_after_s", BigInteger),
    Column("model", Text),
    Column("state", Text, nullable=False),
    Column("outcome", Text, nullable=False),  # the state after finalizing: completed or expired
    Column("errors", Text),  # JSON
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("in_progress_at", Double),
    Column("finalizing_at", Double),
    Column("completed_at", Double),
    Column("failed_at", Double),
    Column("expired_at", Double),
    Column("cancelling_at", Double),
    Column("cancelled_at", Double),
    Column("total", Integer, nullable=False),  # lines
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("output_file_id", Text),
    Column("error_file_id", Text),
    Column("pause_reason", Text),
    # The lease of the worker that validates or finalizes the batch.
    Column("fence", Integer, nullable=False),
    Column("holder", Text, nullable=False),
    Column("leased_until", Double, nullable=False),
    Column("not_before", Double, nullable=False),
    Index("batches_by_owner", "owner", "created_at", "id"),
    Index("batches_by_state", "state"),
)

chunks = Table(
    "chunks",
    metadata,
    Column("batch_id", Text, ForeignKey("batches.id"), primary_key=True),
    Column("seq", Integer, primary_key=True),
    # The part of the input file.
    Column("offset", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("first_line", Integer, nullable=False),
    Column("lines", Integer, nullable=False),  # without empty ones
    # The lease of the worker that computes it.
    Column("fence", Integer, nullable=False),
    Column("holder", Text, nullable=False),
    Column("leased_at", Double, nullable=False),
    Column("leased_until", Double, nullable=False),
    Column("not_before", Double, nullable=False),
    Column("crashes", Integer, nullable=False),  # leases that their holder neither used nor returned
    # Its results.
    Column("done", Integer, nullable=False),  # 0 or 1
    Column("segment", Text),  # name of the file
    Column("segment_sha256", Text),
    Column("output_bytes", BigInteger),  # the beginning of the segment; the rest are lines of the error file
    Column("completed", Integer),
    Column("failed", Integer),
    Column("tokens", BigInteger),
)
