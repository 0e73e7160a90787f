"""Measures what the result cache costs for texts that are all different, and what it saves for repeated ones."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import QUICK_HELP
from benchmarks.contenders import SERVICE_CACHE
from benchmarks.report import describe_run, format_number, format_spread, log_progress, markdown_table, ratios
from benchmarks.texts import Corpus, count_texts, count_tokens, describe_texts
from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.embedder import Embedder
from emb_model_provider.serving.result_cache import ResultCache
from emb_model_provider.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.texts import Kind
    from emb_model_provider.serving.result_cache import ModelResults

_DIMENSION = 384
_CASES: tuple[tuple[Kind, int], ...] = (("short", 1), ("short", 64), ("doc", 1), ("doc", 32))
"""Kind of texts, and texts of a call."""


@dataclass(slots=True)
class Measured:
    """Seconds for a text, of each round."""

    without: list[float] = field(default_factory=list)
    unique: list[float] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)
    bookkeeping: list[float] = field(default_factory=list)
    """Looking up and keeping the vectors of new texts, in a cache that is full."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    rounds, texts = (1, 64) if options.quick else (options.rounds, options.texts)
    corpus = Corpus()
    measured = {case: Measured() for case in _CASES}
    cache = _full_cache()
    with _embedder(0) as without, _embedder(64) as with_cache:
        for embedder in (without, with_cache):
            embedder.embed(corpus.texts("doc", 64))
        for number in range(rounds):
            log_progress(f"round {number + 1} of {rounds}")
            for (kind, size), values in measured.items():
                values.without.append(_time(without, corpus.texts(kind, texts), size))
                unique = corpus.texts(kind, texts)
                values.unique.append(_time(with_cache, unique, size))
                values.repeated.append(_time(with_cache, unique, size))
                values.bookkeeping.append(_time_bookkeeping(cache, corpus.texts(kind, texts), size))
        about = f"{without.description.backend} {without.description.precision}"
    print(_report(measured, texts, about))
    return 0


def _embedder(megabytes: float) -> Embedder:
    settings = Settings.from_values(cache_dir=str(SERVICE_CACHE), offline=True, result_cache_mb=megabytes)
    return Embedder(settings=settings)


def _full_cache() -> ResultCache:
    cache = ResultCache(64 * 2**20)
    results = cache.open()
    size = -1
    for first in range(0, 2**31, 1000):
        if cache.size_bytes <= size:
            return cache
        size = cache.size_bytes
        _look_up(results, [[number] * 16 for number in range(first, first + 1000)])
    raise AssertionError("the cache has no limit")


def _look_up(results: ModelResults, rows: list[list[int]]) -> None:
    """Look up vectors that are not kept, and keep them."""
    batch = TokenBatch(ids=rows, prompt_lengths=[0] * len(rows))
    vectors = np.zeros((len(rows), _DIMENSION), dtype=np.float32)
    results.look_up(batch, ("dense",)).complete([(vector,) for vector in vectors])


def _time(embedder: Embedder, texts: Sequence[str], size: int) -> float:
    started = time.perf_counter()
    for start in range(0, len(texts), size):
        embedder.embed(texts[start : start + size])
    return (time.perf_counter() - started) / len(texts)


def _time_bookkeeping(cache: ResultCache, texts: Sequence[str], size: int) -> float:
    """Return seconds for a text. Token ids are numbers here, as many as the text has."""
    results = cache.open()
    rows = [list(range(number, number + count_tokens(text))) for number, text in enumerate(texts)]
    started = time.perf_counter()
    for start in range(0, len(rows), size):
        _look_up(results, rows[start : start + size])
    return (time.perf_counter() - started) / len(rows)


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reuse", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--texts", type=int, default=512, help="texts of a round (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


def _report(measured: dict[tuple[Kind, int], Measured], texts: int, about: str) -> str:
    notes = [
        *describe_texts("short", "doc"),
        f"One caller in the same process, {texts} texts in a round and case; {about}",
        "Bookkeeping is measured alone, with a full cache of 64 MiB. Its cost is relative to the time without a cache",
    ]
    head = [
        "texts of a call",
        "without, µs/text",
        "with / without",
        "bookkeeping, µs/text",
        "cost, %",
        "repeated, µs/text",
    ]
    rows = [
        [
            count_texts(*case),
            format_number(median(values.without) * 1e6),
            format_spread(ratios(values.unique, values.without)),
            format_number(median(values.bookkeeping) * 1e6),
            format_number(100 * median(values.bookkeeping) / median(values.without)),
            format_number(median(values.repeated) * 1e6),
        ]
        for case, values in measured.items()
    ]
    return f"## Cost of the result cache\n\n{markdown_table(head, rows)}\n\n{describe_run('benchmarks.reuse', notes)}"


if __name__ == "__main__":
    sys.exit(main())
