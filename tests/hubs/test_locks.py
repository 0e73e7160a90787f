"""Locks: shared and alone, across threads and processes, and gone from the disk afterwards."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from emb_model_provider.snapshots.locks import Held, claim, is_held, remove_stale, share

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from emb_model_provider.snapshots.locks import share

held = share(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""

FORKS = """
import os, sys
from pathlib import Path
from emb_model_provider.snapshots.locks import is_held, share

path = Path(sys.argv[1])
held = share(path)
if (child := os.fork()) == 0:
    sys.exit(0)
os.waitpid(child, 0)
print("held" if is_held(path) else "lost")
"""
NOT_OURS = """
import ctypes, os, sys
from pathlib import Path
from emb_model_provider.snapshots.locks import claim, share

if os.getuid() == 0:
    # No permission binds root. Without its capabilities it is an owner like any other.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0
path = Path(sys.argv[1]) / "a.lock"
share(path).release()
try:
    claim(path)
except PermissionError:
    print("refused")
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="files in use cannot be removed there")


def test_several_share_a_lock_and_nobody_has_it_alone_meanwhile(tmp_path: Path) -> None:
    """A lock that two share can be claimed once both have let go, and leaves no file."""
    path = tmp_path / "locks" / "a.lock"
    first, second = share(path), share(path)
    assert is_held(path)
    assert claim(path) is None
    first.release()
    first.release()
    assert claim(path) is None
    second.release()
    assert not path.exists()
    with claim(path) or pytest.fail("nobody has it"):
        assert is_held(path)
        assert claim(path) is None
    assert not is_held(path)
    assert not list(path.parent.iterdir())


def test_who_waited_has_the_lock_that_others_find(tmp_path: Path) -> None:
    """A lock whose file went while somebody waited for it is held anew: nobody else gets it alone then."""
    path = tmp_path / "a.lock"
    alone = claim(path)
    assert alone is not None
    shared: list[Held] = []
    waiter = threading.Thread(target=lambda: shared.append(share(path)))
    waiter.start()
    threading.Timer(0.2, alone.release).start()
    waiter.join()
    assert claim(path) is None
    shared.pop().release()
    assert not path.exists()


def test_what_is_forgotten_is_let_go(tmp_path: Path) -> None:
    """A hold that nothing refers to any more holds nothing, and leaves no file."""
    path = tmp_path / "a.lock"
    share(path)
    assert not is_held(path)
    assert not path.exists()


def test_only_one_at_a_time_has_a_lock_that_is_removed_each_time(tmp_path: Path) -> None:
    """However many threads take turns, no two are inside at once, though each removes the file when it leaves."""
    path = tmp_path / "a.lock"
    inside: list[int] = []
    most: list[int] = []

    def take_turns() -> None:
        for _ in range(40):
            held = claim(path, wait_s=None)
            assert held is not None
            with held:
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=take_turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 160
    assert max(most) == 1
    assert not path.exists()


def test_a_claim_waits_and_can_be_called_off(tmp_path: Path) -> None:
    """Who waits is told so once, gets the lock when it is free, and goes away empty-handed when told to stop."""
    path = tmp_path / "a.lock"
    held = share(path)
    told: list[int] = []
    assert claim(path, wait_s=None, on_wait=lambda: told.append(1), stopped=lambda: bool(told)) is None
    assert told == [1]
    threading.Timer(0.3, held.release).start()
    with claim(path, wait_s=60.0) or pytest.fail("it was let go"):
        pass


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    """The lock of a process that was killed is free, and what it left of it is removed."""
    path = tmp_path / "a.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert is_held(path)
        assert not remove_stale(path)
        child.kill()
        child.communicate()
    assert not is_held(path)
    assert path.exists()
    assert remove_stale(path)
    assert not path.exists()


@pytest.mark.skipif(
    sys.platform != "linux" and os.geteuid() == 0, reason="permissions do not bind root, nor can it step down"
)
def test_where_no_lock_can_be_made_nobody_waits_for_one(tmp_path: Path) -> None:
    """In a directory of somebody else, as in an image that root baked, a share holds nothing, and a claim is refused."""
    tmp_path.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", NOT_OURS, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        tmp_path.chmod(0o755)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK], ids=["ENOSYS", "ENOLCK"])
def test_without_flock_one_at_a_time_still_has_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """On a file system that knows no flock a lock can be claimed, by one at a time, and leaves no file."""

    def flock(descriptor: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    path = tmp_path / "a.lock"
    share(path).release()
    for _ in range(2):
        with claim(path) or pytest.fail("nobody has it"):
            assert claim(path) is None
    assert not list(tmp_path.iterdir())


def test_a_fork_does_not_let_go_of_its_parents_lock(tmp_path: Path) -> None:
    """A forked process that ends, as a server's workers do, leaves the lock with the process that took it."""
    script = [sys.executable, "-c", FORKS, str(tmp_path / "a.lock")]
    assert subprocess.check_output(script, cwd=ROOT, text=True, timeout=120) == "held\n"
