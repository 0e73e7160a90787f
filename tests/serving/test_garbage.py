"""What the collector sets aside when a model is loaded, and where memory comes from."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref

import pytest

from emb_model_provider.backends.hardware import usable_cpus
from emb_model_provider.serving.memory_tuning import freeze_gc


class _Node:
    def __init__(self) -> None:
        self.itself = self


def test_a_model_that_is_gone_is_freed_when_the_next_is_loaded() -> None:
    """Objects in a cycle were set aside with everything else; once nobody holds them they do not stay for ever."""
    before = gc.get_threshold()
    try:
        node = _Node()
        gone = weakref.ref(node)
        freeze_gc()
        assert gc.get_freeze_count() > 0
        del node
        freeze_gc()
        assert gone() is None
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


ARENAS = """
import ctypes, sys, threading
from emb_model_provider.serving.memory_tuning import keep_memory_together

if sys.argv[1] == "few":
    keep_memory_together()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
together = threading.Barrier(int(sys.argv[2]))


def take():
    together.wait()
    libc.malloc(100_000)
    together.wait()


threads = [threading.Thread(target=take) for _ in range(together.parties)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
file = libc.fopen(b"/dev/stdout", b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no such arenas")
def test_threads_share_arenas() -> None:
    """Many threads that allocate at a time do so from one arena a processor and one more, and no more."""
    expected = usable_cpus() + 1

    def arenas(how: str, **changes: str) -> int:
        command = [sys.executable, "-c", ARENAS, how, str(2 * expected)]
        environ = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | changes
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
        return done.stdout.count("<heap nr=")

    assert arenas("few") <= expected < arenas("many")
    assert arenas("few", MALLOC_ARENA_MAX=str(8 * expected)) > expected, "the operator's own word wins"
