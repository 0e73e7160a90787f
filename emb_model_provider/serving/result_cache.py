"""Results that are reused: identical inputs of a request are computed once, and recent vectors are kept in memory.

A kept vector belongs to one loaded model: one snapshot at one precision on one device. It is found by the token ids, and by
nothing that is similar to them, so that a hit is what the model computed for exactly this input.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    Key = tuple[int, str | None, int, bytes]
    """The model, the task, the number of prompt tokens, and the token ids."""

_ENTRY_BYTES = 400
"""Memory of an entry in addition to its token ids and its vector, on CPython 3.11."""


class ResultCache:
    """The vectors of recent inputs of all models, the least recently used of which are removed. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        """Create a cache that takes this much memory at most; 0 keeps nothing."""
        self._max_bytes = max_bytes
        self._size = 0
        self._entries: OrderedDict[Key, bytes] = OrderedDict()
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
        """Remove the vectors of a model, and keep none of it any longer."""
        with self._lock:
            self._open.discard(model)
            for key in [key for key in self._entries if key[0] == model]:
                self._remove(key)

    def get(self, keys: Collection[Key]) -> dict[Key, bytes]:
        """Return the vectors that are kept, as bytes of float32, and mark them as used."""
        found: dict[Key, bytes] = {}
        if not self._entries:
            return found
        with self._lock:
            for key in keys:
                vector = self._entries.get(key)
                if vector is not None:
                    found[key] = vector
                    self._entries.move_to_end(key)
        return found

    def put(self, vectors: Mapping[Key, NDArray[np.float32]]) -> None:
        """Keep vectors, unless their model is closed."""
        if not self.is_enabled:
            return
        with self._lock:
            for key, vector in vectors.items():
                if key[0] in self._open and key not in self._entries:
                    entry = self._entries[key] = vector.tobytes()
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

    def look_up(self, ids: Sequence[Sequence[int]], prompt_lengths: Sequence[int], task: str | None) -> Lookup:
        """Find out which inputs of a request must be computed.

        Args:
            ids: The token ids of each input.
            prompt_lengths: The number of prompt tokens of each input, or 0 if the model does not exclude them.
            task: The task of an asymmetric model.
        """
        keys: list[Key] = [
            (self._model, task, length, array("I", row).tobytes())
            for row, length in zip(ids, prompt_lengths, strict=True)
        ]
        return Lookup(self._cache, keys)

    def close(self) -> None:
        """Drop all vectors, because the model is unloaded or loaded again."""
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
        """The inputs to compute: the first one of each group of identical inputs whose vector is not kept."""

    @property
    def hits(self) -> int:
        """Number of different inputs whose vectors are kept."""
        return len(self._kept)

    def complete(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the vectors of all inputs, in their order, and keep the computed ones.

        Args:
            vectors: float32 of shape (rows, dimension): those of `rows`.
        """
        computed = {self._keys[row]: vector for row, vector in zip(self.rows, vectors, strict=True)}
        self._cache.put(computed)
        if len(computed) == len(self._keys):
            return vectors
        result = np.empty((len(self._keys), vectors.shape[1]), dtype=np.float32)
        for row, key in enumerate(self._keys):
            vector = computed.get(key)
            result[row] = vector if vector is not None else np.frombuffer(self._kept[key], dtype=np.float32)
        return result


def _size(key: Key, vector: bytes) -> int:
    return _ENTRY_BYTES + len(key[-1]) + len(vector)
