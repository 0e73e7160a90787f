"""File locks between threads and processes, and the locks that keep snapshots on disk while they are used.

A lock is a file that is locked with flock: exclusively to change something, shared to use it. It is released when its
process ends, however that ends. The files are kept on disk, because removing one while another process waits for it
could let two processes hold the same lock.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import sys
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, cast

from emb_model_provider.progress import CancelToken

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Self

_POLL_S = 0.2
_MIN_WAIT_S = 0.25
"""How long a lock is tried at least, because a process that only checks a lock holds it for a moment."""
_CHECK_TRIES = 4
_CHECK_EVERY_S = 0.005
_BUSY = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


class FileLock:
    """A lock that is held until it is released, garbage-collected, or its process ends."""

    def __init__(self, release: Callable[[], None]) -> None:
        """Wrap a lock. `release` must not refer to this object, because then it would never be garbage-collected."""
        self._release = weakref.finalize(self, release)

    def release(self) -> None:
        """Release the lock. Releasing it again does nothing."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_shared(path: Path) -> FileLock:
    """Lock a file together with others. Waits while a process holds it exclusively."""
    if sys.platform != "win32":  # Windows does not remove files that are open
        # If the lock file cannot be created, nothing can be removed from its directory either.
        with contextlib.suppress(OSError):
            if (lock := _lock(path, fcntl.LOCK_SH, lambda: True)) is not None:
                return lock
    return FileLock(lambda: None)


def lock_exclusive(
    path: Path,
    *,
    on_wait: Callable[[], None] = lambda: None,
    cancel: CancelToken | None = None,
    timeout_s: float = math.inf,
) -> FileLock:
    """Lock a file alone, waiting until `cancel` is cancelled. Calls `on_wait` once if another process holds the lock.

    Raises TimeoutError if the other process still holds it after `timeout_s` seconds.
    """
    token = cancel or CancelToken()
    deadline = time.monotonic() + timeout_s
    waiting = False

    def keep_waiting() -> bool:
        nonlocal waiting
        token.raise_if_cancelled()
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has held {path} for more than {timeout_s:g} s")
        if not waiting:
            waiting = True
            on_wait()
        time.sleep(_POLL_S)
        return True

    return cast("FileLock", _lock_exclusive(path, keep_waiting))  # not None, because keep_waiting() is never False


def try_lock_exclusive(path: Path, *, wait_s: float = 0.0) -> FileLock | None:
    """Lock a file alone, or return None if others still hold it after `wait_s` seconds."""
    deadline = time.monotonic() + max(wait_s, _MIN_WAIT_S)

    def keep_waiting() -> bool:
        time.sleep(_POLL_S if wait_s else _POLL_S / 10)
        return time.monotonic() < deadline

    return _lock_exclusive(path, keep_waiting)


def is_locked(path: Path) -> bool:
    """Return whether any process holds a lock, shared or exclusively. Does not wait, and creates no file."""
    if sys.platform == "win32":
        return False
    try:
        descriptor = _open(path, create=False)
    except OSError:
        return False
    try:
        # Several tries, because other processes that check at the same moment hold it for microseconds.
        for _ in range(_CHECK_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _BUSY:
                    return False
                time.sleep(_CHECK_EVERY_S)
            else:
                return False
        return True
    finally:
        os.close(descriptor)


class SnapshotLocks:
    """Locks of snapshots: shared by the processes that use one, held exclusively to remove or replace it."""

    def __init__(self, cache_dir: Path) -> None:
        self._directory = cache_dir / "holds"

    def hold(self, snapshot: Path) -> FileLock:
        """Keep a snapshot on disk. Waits while it is being removed: check afterwards whether it still exists."""
        return lock_shared(self._path(snapshot))

    def try_lock(self, snapshot: Path, *, wait_s: float = 0.0) -> FileLock | None:
        """Lock a snapshot in order to remove it, or return None if it is still in use after `wait_s` seconds."""
        return try_lock_exclusive(self._path(snapshot), wait_s=wait_s)

    def is_held(self, snapshot: Path) -> bool:
        return is_locked(self._path(snapshot))

    def _path(self, snapshot: Path) -> Path:
        real = os.path.realpath(snapshot)
        readable = re.sub(r"[^A-Za-z0-9._-]+", "--", real)[-60:].strip("-.")
        return self._directory / f"{readable}--{hashlib.sha256(os.fsencode(real)).hexdigest()[:16]}.hold"


def _lock_exclusive(path: Path, keep_waiting: Callable[[], bool]) -> FileLock | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        return _lock_portable(path, keep_waiting)
    try:
        return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB, keep_waiting)
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return _lock_portable(path, keep_waiting)
        raise


def _lock(path: Path, operation: int, keep_waiting: Callable[[], bool]) -> FileLock | None:
    """Lock a file, or return None once `keep_waiting` returns False."""
    while True:
        try:
            descriptor = _open(path)
        except FileNotFoundError:  # its directory does not exist
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(descriptor, operation)
            is_current = _is_same_file(descriptor, path)
        except OSError as error:
            if error.errno in _NO_FLOCK and os.fstat(descriptor).st_size == 0:
                path.unlink(missing_ok=True)  # created above; a portable lock contains its owner
            os.close(descriptor)
            if error.errno not in _BUSY:
                raise
            if not keep_waiting():
                return None
        except BaseException:
            os.close(descriptor)
            raise
        else:
            if is_current:
                return FileLock(partial(_unlock, descriptor, os.getpid()))
            os.close(descriptor)  # another program, or an older version, removed the file: lock the new one


def _open(path: Path, *, create: bool = True) -> int:
    try:
        # Open for writing, because network file systems lock only such files exclusively. For the same reason a group
        # that shares the cache (umask 002) can write to the file.
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        try:  # another user's file, in a shared cache
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise error from None  # it does not exist and cannot be created


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _unlock(descriptor: int, owner: int) -> None:
    """Release a lock. In a fork of its owner only the descriptor is closed, so that the owner keeps the lock."""
    try:
        if os.getpid() == owner:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _lock_portable(path: Path, keep_waiting: Callable[[], bool]) -> FileLock | None:
    import filelock  # imports asyncio, so only where it is needed

    # Without flock the file itself is the lock and contains its owner; a lock whose owner is gone is taken over.
    kind = filelock.FileLock if sys.platform == "win32" else filelock.SoftFileLock
    lock = kind(path, thread_local=False)
    while True:
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            if not keep_waiting():
                return None
        else:
            return FileLock(lock.release)
