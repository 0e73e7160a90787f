"""Locks between processes and threads that leave no file behind.

A lock is a file that is locked with flock: exclusively by who changes something, shared by who uses it. It ends with
its process, however that ends. Whoever lets go last removes the file; that is safe because everybody, once it has the
lock, makes sure that the file it locked is still the one of that name, and else begins again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING

if sys.platform != "win32":
    import fcntl
import hashlib
import re

from emb_model_provider.snapshots.files import listed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType
    from typing import Self


_POLL_S = 0.2
_PATIENCE_S = 0.25
"""How long a lock that is asked for without waiting is tried: whoever only looks whether it is held has it for less."""
_LOOK_TRIES = 4
_LOOK_EVERY_S = 0.005
_BUSY = {errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK}
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


class Held:
    """A lock that is held until it is released, or forgotten, or the process ends."""

    def __init__(self, let_go: Callable[[], None] | None) -> None:
        """`let_go` must not refer to this object; None is a lock that nobody needs, where nothing can be changed."""
        self._let_go = weakref.finalize(self, let_go) if let_go is not None else None

    def release(self) -> None:
        """Let go. Calling it again does nothing."""
        if self._let_go is not None:
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def share(path: Path) -> Held:
    """Hold a lock together with others; waits while somebody holds it exclusively.

    Holds nothing where the lock's directory cannot be written: nothing is removed there either.
    """
    if sys.platform == "win32":
        return Held(None)  # a file in use cannot be removed there
    try:
        descriptor = _lock(path, fcntl.LOCK_SH, lambda: True)
    except OSError:
        return Held(None)
    return Held(None if descriptor is None else partial(_let_go, descriptor, path, os.getpid()))


def claim(
    path: Path,
    *,
    wait_s: float | None = 0.0,
    on_wait: Callable[[], None] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Held | None:
    """Hold a lock alone; None where others still hold it after `wait_s` seconds. None waits for as long as it takes.

    `on_wait` is called once, when there is something to wait for; `stopped` is asked a few times a second, and ends
    the wait.

    Raises: OSError where the lock's file cannot be made.
    """  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    told = False

    def go_on() -> bool:
        nonlocal told
        waited_s = time.monotonic() - began
        if stopped() or (wait_s is not None and waited_s >= max(wait_s, _PATIENCE_S)):
            return False
        if not told and (wait_s is None or wait_s > 0):
            told = True
            on_wait()
        time.sleep(_POLL_S if told else _POLL_S / 10)
        return True

    if sys.platform == "win32":
        return _claim_portable(path, go_on)
    try:
        descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB, go_on)
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return _claim_portable(path, go_on)
        raise
    return None if descriptor is None else Held(partial(_let_go, descriptor, path, os.getpid()))


def is_held(path: Path) -> bool:
    """Whether anybody holds a lock, shared or alone. Waits for nobody and makes no file."""
    if sys.platform == "win32":
        return False
    try:
        descriptor = _open(path, make=False)
    except OSError:
        return False
    try:
        # Others who look at the same moment have it for microseconds.
        for _ in range(_LOOK_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _BUSY:
                    return False
                time.sleep(_LOOK_EVERY_S)
            else:
                return False
        return True
    finally:
        os.close(descriptor)


def remove_stale(path: Path) -> bool:
    """Remove the file of a lock that nobody holds, such as a killed process left; return whether it is gone."""
    try:
        held = claim(path) if path.exists() and not is_held(path) else None
    except OSError:
        return False
    if held is None:
        return not path.exists()
    held.release()
    return True


def _lock(path: Path, how: int, go_on: Callable[[], bool]) -> int | None:
    """Return a descriptor of the locked file, or None once `go_on` says to stop. Raises: OSError."""
    while True:
        try:
            descriptor = _open(path)
        except FileNotFoundError:  # its directory: never made, or removed with what was last in it
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(descriptor, how)
            if _is_at(descriptor, path):
                return descriptor
        except OSError as error:
            if error.errno in _NO_FLOCK and os.fstat(descriptor).st_size == 0:
                path.unlink(missing_ok=True)  # ours: who locks without flock writes down who it is
            os.close(descriptor)
            if error.errno not in _BUSY:
                raise
            if not go_on():
                return None
        except BaseException:
            os.close(descriptor)
            raise
        else:
            os.close(descriptor)  # removed by who had it before: somebody may hold the new one


def _open(path: Path, *, make: bool = True) -> int:
    """Raises: FileNotFoundError where it, or with `make` its directory, is not there; other OSErrors."""
    try:
        # For writing, whoever locks: network file systems lock nothing exclusively that is open for reading only.
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o644)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        try:  # another user's, in a cache that several share
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise error from None  # it is not there, and cannot be made


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def _let_go(descriptor: int, path: Path, owner: int) -> None:
    """`owner`: the process that took the lock. A fork of it has the descriptor, too, but not the say."""
    try:
        if os.getpid() != owner:
            return
        # Of several that share it only the last one gets it alone.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                path.unlink()
    finally:
        os.close(descriptor)


def _claim_portable(path: Path, go_on: Callable[[], bool]) -> Held | None:
    import filelock  # with asyncio behind it: only where it is needed

    # Without flock the file itself is the lock, with its owner's name in it; one whose owner is gone is taken over.
    kind = filelock.FileLock if sys.platform == "win32" else filelock.SoftFileLock
    lock = kind(path, thread_local=False)
    while True:
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            if not go_on():
                return None
        else:
            return Held(lock.release)


SnapshotHold = Held
"""Keeps a snapshot from being removed until `release()`, which may be called again, or until the process ends."""


class SnapshotHolds:
    """The holds of one cache directory, by the directory of the snapshot."""

    def __init__(self, cache_dir: Path) -> None:
        self._directory = cache_dir / "holds"

    def hold(self, snapshot: Path) -> SnapshotHold:
        """Hold a snapshot together with others. Waits while it is being removed: look afterwards whether it is there."""
        return share(self._path(snapshot))

    def claim(self, snapshot: Path, *, wait_s: float = 0.0) -> SnapshotHold | None:
        """Have a snapshot alone, to remove it; None where it is in use for longer than `wait_s` seconds.

        Raises: OSError where the cache directory cannot be written.
        """
        return claim(self._path(snapshot), wait_s=wait_s)

    def is_held(self, snapshot: Path) -> bool:
        """Whether any process uses a snapshot now."""
        return is_held(self._path(snapshot))

    def sweep(self) -> None:
        """Remove what killed processes left."""
        for path in listed(self._directory, "*.hold"):
            remove_stale(path)

    def remove_empty_directory(self) -> None:
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def _path(self, snapshot: Path) -> Path:
        place = os.path.realpath(snapshot)
        readable = re.sub(r"[^A-Za-z0-9._-]+", "--", place)[-60:].strip("-.")
        return self._directory / f"{readable}--{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.hold"
