"""File locks: shared and exclusive, between threads and processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from emb_model_provider.errors import OperationCancelledError
from emb_model_provider.progress import CancelToken
from emb_model_provider.snapshots.locks import FileLock, is_locked, lock_exclusive, lock_shared, try_lock_exclusive

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from emb_model_provider.snapshots.locks import lock_shared

lock = lock_shared(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""
FORK = """
import os, sys
from pathlib import Path
from emb_model_provider.snapshots.locks import is_locked, lock_shared

path = Path(sys.argv[1])
lock = lock_shared(path)
if (child := os.fork()) == 0:
    sys.exit(0)
os.waitpid(child, 0)
print("locked" if is_locked(path) else "lost")
"""
LOCK_WITHOUT_PERMISSION = """
import ctypes, os, sys
from pathlib import Path
from emb_model_provider.snapshots.locks import lock_shared, try_lock_exclusive

if os.getuid() == 0:
    # Permissions do not apply to root. Without its capabilities it is an owner like any other.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0
directory = Path(sys.argv[1])
lock_shared(directory / "new.lock").release()
try:
    try_lock_exclusive(directory / "new.lock")
except PermissionError:
    print("refused")
with lock_shared(directory / "existing.lock"):
    print(try_lock_exclusive(directory / "existing.lock"))
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="files in use cannot be removed there")


def test_shared_locks_exclude_an_exclusive_lock(tmp_path: Path) -> None:
    """A lock that is held twice can be locked exclusively when both holders have released it."""
    path = tmp_path / "locks" / "a.lock"
    first, second = lock_shared(path), lock_shared(path)
    assert is_locked(path)
    assert try_lock_exclusive(path) is None
    first.release()
    first.release()
    assert try_lock_exclusive(path) is None
    second.release()
    with try_lock_exclusive(path) or pytest.fail("it is free"):
        assert is_locked(path)
        assert try_lock_exclusive(path) is None
    assert not is_locked(path)


def test_lock_file_is_kept(tmp_path: Path) -> None:
    """A released lock leaves its file, and checking a lock creates none."""
    path = tmp_path / "a.lock"
    assert not is_locked(path)
    assert not path.exists()
    lock_exclusive(path).release()
    assert path.exists()


def test_waiting_for_a_lock_whose_file_is_replaced_locks_the_new_file(tmp_path: Path) -> None:
    """An older version removes the file of a lock that it releases: two processes never hold the same lock."""
    path = tmp_path / "a.lock"
    exclusive = lock_exclusive(path)
    shared: list[FileLock] = []
    waiter = threading.Thread(target=lambda: shared.append(lock_shared(path)))
    waiter.start()

    def release_as_older_versions() -> None:
        path.unlink()
        exclusive.release()

    threading.Timer(0.2, release_as_older_versions).start()
    waiter.join()
    assert try_lock_exclusive(path) is None
    shared.pop().release()
    assert not is_locked(path)


def test_garbage_collected_lock_is_released(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    lock_shared(path)
    assert not is_locked(path)


def test_exclusive_lock_excludes_other_threads(tmp_path: Path) -> None:
    """Four threads take turns; no two of them hold the lock at once."""
    path = tmp_path / "a.lock"
    holders: list[int] = []
    counts: list[int] = []

    def take_turns() -> None:
        for _ in range(40):
            with lock_exclusive(path):
                holders.append(1)
                counts.append(len(holders))
                holders.pop()

    threads = [threading.Thread(target=take_turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [1] * 160


def test_waiting_for_a_lock_is_reported_once_and_can_be_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    lock = lock_shared(path)
    waits: list[int] = []
    cancel = CancelToken(lambda: bool(waits))
    with pytest.raises(OperationCancelledError):
        lock_exclusive(path, on_wait=lambda: waits.append(1), cancel=cancel)
    assert waits == [1]
    threading.Timer(0.3, lock.release).start()
    with try_lock_exclusive(path, wait_s=60.0) or pytest.fail("it was released"):
        pass


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        assert is_locked(path)
        child.kill()
        child.communicate()
    assert not is_locked(path)


@pytest.mark.skipif(
    sys.platform != "linux" and os.geteuid() == 0, reason="permissions do not apply to root on this platform"
)
def test_locking_in_a_read_only_directory(tmp_path: Path) -> None:
    """In another user's directory, as in a container image, an existing file is locked, and a new one is not created.

    A shared lock without a file locks nothing, because nothing can be removed there; an exclusive one is an error.
    """
    (tmp_path / "existing.lock").touch()
    tmp_path.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOCK_WITHOUT_PERMISSION, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        tmp_path.chmod(0o755)
    assert done.stdout == "refused\nNone\n", done.stderr


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK], ids=["ENOSYS", "ENOLCK"])
def test_exclusive_lock_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """On a file system without flock a lock still has one holder at a time."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    path = tmp_path / "a.lock"
    lock_shared(path).release()
    for _ in range(2):
        with try_lock_exclusive(path) or pytest.fail("it is free"):
            assert try_lock_exclusive(path) is None
    assert not list(tmp_path.iterdir())


def test_fork_does_not_release_the_lock_of_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORK, str(tmp_path / "a.lock")]
    assert subprocess.check_output(command, cwd=ROOT, text=True, timeout=120) == "locked\n"


def test_members_of_a_group_can_write_to_each_others_lock_files(tmp_path: Path) -> None:
    """With umask 002, because network file systems lock exclusively only files that are open for writing."""
    before = os.umask(0o002)
    try:
        lock_exclusive(tmp_path / "a.lock").release()
    finally:
        os.umask(before)
    assert (tmp_path / "a.lock").stat().st_mode & 0o777 == 0o664
