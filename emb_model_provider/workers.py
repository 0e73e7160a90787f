"""The workers of one service: several processes that answer requests behind the same port (`EMB_PROVIDER_WORKERS`).

The event loop of one process takes 0.3 to 0.6 ms for a request with one short text, which limits machines with many
processors. With N workers there are N processes, each with its event loop, and its threads on a share of the processors.

Worker 0 is the primary: a complete service. It alone decides which models are served, loads them first, and answers
everything but inference: management, lists, files, batches, the console and `/ready`. The others follow it: each of them
loads the models that the primary has loaded, from the same files, answers requests for these, and forwards all other
requests to the primary (`api/worker_forwarding.py`, `api/worker_sync.py`). So there is one place where models change, and
no client gets another answer because it is connected to another worker.

This module has what the supervisor and the workers share: a directory that only this user can read, with a private Unix
socket for each worker, the files of the metrics, and a page of shared memory. It imports the standard library only,
because the process of the supervisor stays small.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import socket
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from emb_model_provider.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PRIMARY = 0
"""Index of the worker that decides which models are served."""

_BACKLOG = 1024
_MAX_SOCKET_PATH = 100
"""Unix limits the path of a socket to 103 bytes or more."""
_SHARED_FILE = "shared"
_VALUE_BYTES = 8


class SharedMemory:
    """Numbers that all workers read: the open connections of each, and the quotas of keys.

    Each number of connections is written by one process, without a lock. Quotas are changed under a lock of the file, which
    the operating system releases if its holder is killed.
    """

    def __init__(self, path: Path, workers: int) -> None:
        """Map the file that `create` made."""
        self._descriptor = os.open(path, os.O_RDWR)  # for locks, until the process ends
        self._values = memoryview(mmap.mmap(self._descriptor, 0)).cast("d")
        self._workers = workers

    @classmethod
    def create(cls, path: Path, workers: int, quotas: int) -> Self:
        """Create the file, for workers that accept no connections yet and buckets that have never been used."""
        path.write_bytes(bytes(_VALUE_BYTES * (workers + 2 * quotas)))
        shared = cls(path, workers)
        for index in range(len(shared._values)):
            shared._values[index] = math.inf if index < workers else math.nan
        return shared

    def set_connections(self, worker: int, connections: int) -> None:
        """Set how many connections a worker has; from now on it counts as one that accepts connections."""
        self._values[worker] = connections

    def close_worker(self, worker: int) -> None:
        """Note that a worker accepts no connections."""
        self._values[worker] = math.inf

    def excess(self, worker: int) -> float:
        """Return how many connections a worker has more than the one with the fewest; 0 if it has the fewest."""
        return self._values[worker] - min(self._values[: self._workers])

    @contextmanager
    def bucket(self, index: int) -> Iterator[tuple[float, float, memoryview[float]]]:
        """Yield the tokens and the time of a bucket, both NaN if it was never used, and the view to write them to.

        Only one process has a bucket at a time.
        """
        import fcntl

        start = self._workers + 2 * index
        view = self._values[start : start + 2]
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, _VALUE_BYTES, start * _VALUE_BYTES)
        try:
            yield view[0], view[1], view
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, _VALUE_BYTES, start * _VALUE_BYTES)


@dataclass(frozen=True, slots=True)
class Worker:
    """One of several workers, as its own process sees it."""

    index: int
    count: int
    directory: Path
    """The directory of the group."""
    socket: socket.socket
    """Listens for the other workers. The supervisor holds it, too, so that requests wait while this worker is restarted."""

    @property
    def is_primary(self) -> bool:
        return self.index == PRIMARY

    @property
    def others(self) -> list[int]:
        """The indices of the other workers."""
        return [index for index in range(self.count) if index != self.index]

    def shared_memory(self) -> SharedMemory:
        return SharedMemory(self.directory / _SHARED_FILE, self.count)


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """All workers, as the supervisor sees them."""

    count: int
    directory: Path
    sockets: list[socket.socket]
    shared: SharedMemory
    environment: Mapping[str, str]
    """Variables of each worker."""

    @classmethod
    def create(cls, count: int, *, cpus: int, quotas: int) -> Self:
        """Create the directory of a group, whose workers share `cpus` processors and `quotas` quotas.

        Raises:
            SettingsError: No directory for temporary files can be written, or its path is too long.
        """
        try:
            directory = Path(tempfile.mkdtemp(prefix="emb-workers-"))
        except OSError as error:
            raise SettingsError(
                f"EMB_PROVIDER_WORKERS={count}: no directory for temporary files can be written ({error.strerror}). Set TMPDIR."
            ) from error
        if len(str(socket_path(directory, count))) > _MAX_SOCKET_PATH:
            directory.rmdir()
            raise SettingsError(
                f"EMB_PROVIDER_WORKERS={count}: the path of the directory for temporary files, {directory.parent}, is too "
                "long for a Unix socket. Set TMPDIR to a shorter one."
            )
        sockets = []
        for index in range(count):
            private = socket.socket(socket.AF_UNIX)
            private.bind(str(socket_path(directory, index)))
            private.listen(_BACKLOG)
            sockets.append(private)
        metrics_directory(directory).mkdir()
        # Both count threads of libraries, and `usable_cpus` reads the first one.
        share = str(max(1, cpus // count))
        environment = {"OMP_NUM_THREADS": share, "RAYON_NUM_THREADS": share}
        shared = SharedMemory.create(directory / _SHARED_FILE, count, quotas)
        return cls(count, directory, sockets, shared, environment)

    def remove(self) -> None:
        """Remove the directory, after all workers have ended."""
        shutil.rmtree(self.directory, ignore_errors=True)


def socket_path(directory: Path, index: int) -> Path:
    """Return the path of the private socket of a worker."""
    return directory / f"{index}.sock"


def metrics_directory(directory: Path) -> Path:
    """Return where the workers keep their metrics."""
    return directory / "metrics"
