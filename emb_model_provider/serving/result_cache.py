"""Results that are reused: identical inputs of a request are computed once, and recent results are kept in memory.

A kept result belongs to one loaded model: one snapshot at one precision on one device. It is found by the token ids, and by
nothing that is similar to them, so that a hit is what the model computed for exactly this input.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from itertools import count
from typing import TYPE_CHECKING

from emb_model_provider.backends.base import SparseVector

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from emb_model_provider.backends.base import InputKey, OutputName, Row, TokenBatch

    Key = tuple[int, tuple[OutputName, ...], InputKey]
    """The model, the outputs and the input."""
    Rows = tuple[Row, ...]
    """The outputs of an input."""

_ENTRY_BYTES = 600
"""Memory of an entry in addition to its token ids and its values, on CPython 3.11."""


class ResultCache:
    """The results of recent inputs of all models, the least recently used of which are removed. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        """Create a cache that takes this much memory at most; 0 keeps nothing."""
        self._max_bytes = max_bytes
        self._size = 0
        self._entries: OrderedDict[Key, Rows] = OrderedDict()
        self._models = count()
        self._open: set[int] = set()
        self._lock = threading.Lock()

    @property
    def is_enabled(self) -> bool:
        return self._max_bytes > 0

    @property
    def size_bytes(self) -> int:
        """Memory of the entries, approximately."""
        return self._size

    def open(self) -> ModelResults:
        """Return the results of a model that was just loaded. There are none yet."""
        with self._lock:
            model = next(self._models)
            self._open.add(model)
        return ModelResults(self, model)

    def close(self, model: int) -> None:
        """Remove the results of a model, and keep none of it any longer."""
        with self._lock:
            self._open.discard(model)
            for key in [key for key in self._entries if key[0] == model]:
                self._remove(key)

    def get(self, keys: Collection[Key]) -> dict[Key, Rows]:
        """Return the results that are kept, and mark them as used."""
        found: dict[Key, Rows] = {}
        if not self._entries:
            return found
        with self._lock:
            for key in keys:
                rows = self._entries.get(key)
                if rows is not None:
                    found[key] = rows
                    self._entries.move_to_end(key)
        return found

    def put(self, results: Mapping[Key, Rows]) -> None:
        """Keep results, unless their model is closed."""
        if not self.is_enabled:
            return
        with self._lock:
            for key, rows in results.items():
                if key[0] in self._open and key not in self._entries:
                    entry = self._entries[key] = tuple(map(_kept_copy, rows))
                    self._size += _size(key, entry)
            while self._size > self._max_bytes:
                self._remove(next(iter(self._entries)))

    def _remove(self, key: Key) -> None:
        self._size -= _size(key, self._entries.pop(key))


class ModelResults:
    """The results of one loaded model."""

    def __init__(self, cache: ResultCache, model: int) -> None:
        self._cache = cache
        self._model = model

    def look_up(self, inputs: TokenBatch, outputs: tuple[OutputName, ...]) -> Lookup:
        """Find out which inputs of a request for some outputs must be computed."""
        keys: list[Key] = [(self._model, outputs, inputs.key(row)) for row in range(len(inputs.ids))]
        return Lookup(self._cache, keys)

    def close(self) -> None:
        """Drop all results, because the model is unloaded or loaded again."""
        self._cache.close(self._model)


class Lookup:
    """The inputs of a request, some of which need not be computed."""

    def __init__(self, cache: ResultCache, keys: Sequence[Key]) -> None:
        self._cache = cache
        self._keys = keys
        first: dict[Key, int] = {}
        for row, key in enumerate(keys):
            first.setdefault(key, row)
        self._kept = cache.get(first)
        self.rows = [row for key, row in first.items() if key not in self._kept]
        """The inputs to compute: the first one of each group of identical inputs whose results are not kept."""

    @property
    def hits(self) -> int:
        """Number of different inputs whose results are kept."""
        return len(self._kept)

    def complete(self, computed: Sequence[Rows], *, keep: bool = True) -> Sequence[Rows]:
        """Return the results of all inputs, in their order, and keep the computed ones, which are those of `rows`."""
        by_key = {self._keys[row]: rows for row, rows in zip(self.rows, computed, strict=True)}
        if keep:
            self._cache.put(by_key)
        if len(by_key) == len(self._keys):
            return computed
        by_key |= self._kept
        return [by_key[key] for key in self._keys]


def _kept_copy(row: Row) -> Row:
    """Return a row that nothing else can change, and that does not keep the results of its whole batch in memory."""
    copied = row.copy()
    for array in (copied.indices, copied.values) if isinstance(copied, SparseVector) else (copied,):
        array.flags.writeable = False
    return copied


def _size(key: Key, rows: Rows) -> int:
    return _ENTRY_BYTES + len(key[-1][-1]) + sum(row.nbytes for row in rows)
