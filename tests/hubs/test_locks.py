"""Locks: shared and alone, across threads and processes, and gone from the disk afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from emb_model_provider.hubs.locks import Held, claim, is_held, remove_stale, share

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from emb_model_provider.hubs.locks import share

held = share(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
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
