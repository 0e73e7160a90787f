"""`emb-provider embed IN --out DIR`: the vectors of a whole file, in files."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.output import print_json, say, show_progress, warn
from emb_model_provider.formatting import format_duration
from emb_model_provider.progress import RateMeter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.bulk.job import BulkOptions, Counts, Shard
    from emb_model_provider.embedder import Embedder
    from emb_model_provider.progress import Mode

_EVERY_S = 10.0
_REDRAW_S = 0.2
_CLEAR_LINE = "\r\x1b[2K"


class ShardRange(click.ParamType["Shard"]):
    """A shard such as `0/4`."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shard:
        from emb_model_provider.bulk.job import Shard

        if isinstance(value, Shard):
            return value
        match = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if match is None:
            self.fail(f"{value!r} is not of the form I/N, such as 0/4.", param, ctx)
        index, count = int(match[1]), int(match[2])
        if index >= count:
            self.fail(
                f"{value!r}: shards are numbered from 0, so of {count} the last is {count - 1}/{count}.", param, ctx
            )
        return Shard(index, count)


def embed_file(options: BulkOptions, load: Callable[[], Embedder], mode: Mode, *, as_json: bool) -> None:
    """Run a job, with progress on stderr, and print the result."""
    from emb_model_provider.bulk.job import run_job

    started = time.monotonic()
    shown = RowProgress(mode, options.source.name)

    def work() -> Counts:
        with ExitStack() as scanning:
            report = scanning.enter_context(show_progress(mode))

            def load_after_scan() -> Embedder:
                scanning.close()
                return load()

            return run_job(options, load_after_scan, report, shown)

    counts = run_until_interrupted(
        work, f"the complete parts in {options.out} are kept. To continue, run the same command again."
    )
    shown.clear()
    _print_result(counts, options.out, time.monotonic() - started, as_json=as_json)


def _print_result(counts: Counts, out: Path, seconds: float, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "rows": counts.total_rows,
                "failed_rows": counts.failed_rows,
                "resumed_rows": counts.resumed_rows,
                "parts": counts.total_parts,
                "tokens": counts.tokens,
                "seconds": round(seconds, 3),
            }
        )
    resumed = f", {counts.resumed_rows:,} of them by earlier runs" if counts.resumed_rows else ""
    say(f"{counts.total_rows:,} rows in {counts.total_parts:,} parts in {out}{resumed}; {format_duration(seconds)}.")
    if not counts.total_parts:
        warn("there is nothing to do: the input has no rows, or fewer parts than shards (see --part-rows).")
    if counts.failed_rows:
        warn(f"{counts.failed_rows:,} rows have no vector. The reasons are in {out}/_errors-*.jsonl.")


class RowProgress:
    """Shows rows, rates and the time left: a line that is redrawn on a terminal, else one every 10 s."""

    def __init__(self, mode: Mode, name: str) -> None:
        self._mode = mode
        self._name = name
        self._redraws = mode == "auto" and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._rows = self._tokens = RateMeter(0, 0.0)
        self._shown_at: float | None = None

    def __call__(self, counts: Counts) -> None:
        now = time.monotonic()
        is_first = self._shown_at is None
        if is_first:
            self._rows, self._tokens = RateMeter(counts.done_rows, now), RateMeter(0, now)
        self._rows.update(counts.done_rows, now)
        self._tokens.update(counts.tokens, now)
        due_s = _REDRAW_S if self._redraws else _EVERY_S
        is_end = counts.done_rows == counts.total_rows
        if self._mode != "none" and (self._shown_at is None or is_end or now - self._shown_at >= due_s):
            self._shown_at = now
            self._show(counts)

    def clear(self) -> None:
        """Remove the line that is redrawn."""
        if self._redraws:
            sys.stderr.write(_CLEAR_LINE)
            sys.stderr.flush()

    def _show(self, counts: Counts) -> None:
        rows_per_s, tokens_per_s = self._rows.bytes_per_s, self._tokens.bytes_per_s
        left_s = self._rows.seconds_for(counts.total_rows - counts.done_rows)
        if self._mode == "json":
            line = json.dumps(
                {
                    "phase": "embed",
                    "done_rows": counts.done_rows,
                    "total_rows": counts.total_rows,
                    "failed_rows": counts.failed_rows,
                    "rows_per_s": _rounded(rows_per_s),
                    "tokens_per_s": _rounded(tokens_per_s),
                    "seconds_left": _rounded(left_s),
                }
            )
        else:
            share = f" ({counts.done_rows * 100 // counts.total_rows} %)" if counts.total_rows else ""
            rates = f", {rows_per_s:,.0f} rows/s" if rows_per_s is not None else ""
            rates += f", {tokens_per_s:,.0f} tokens/s" if tokens_per_s is not None else ""
            left = f", {format_duration(left_s)} left" if left_s is not None else ""
            failed = f", {counts.failed_rows:,} failed" if counts.failed_rows else ""
            line = f"{self._name}: {counts.done_rows:,} of {counts.total_rows:,} rows{share}{rates}{left}{failed}"
        sys.stderr.write(f"{_CLEAR_LINE}{line}" if self._redraws else f"{line}\n")
        sys.stderr.flush()


def _rounded(value: float | None) -> int | None:
    return round(value) if value is not None else None
