"""The garbage collector and malloc, as a service sets them up."""

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


def test_next_freeze_frees_unloaded_models() -> None:
    """Objects in a cycle that were frozen are collected by the next call if nothing refers to them."""
    before = gc.get_threshold()
    try:
        node = _Node()
        reference = weakref.ref(node)
        freeze_gc()
        assert gc.get_freeze_count() > 0
        del node
        freeze_gc()
        assert reference() is None
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


ARENAS = """
import ctypes, sys, threading
from emb_model_provider.serving.memory_tuning import limit_malloc_arenas

if sys.argv[1] == "limited":
    limit_malloc_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
barrier = threading.Barrier(int(sys.argv[2]))


def allocate():
    barrier.wait()
    libc.malloc(100_000)
    barrier.wait()


threads = [threading.Thread(target=allocate) for _ in range(barrier.parties)]
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no arenas")
def test_threads_share_arenas() -> None:
    """Many threads that allocate at once use one arena per processor and one more."""
    limit = usable_cpus() + 1

    def count_arenas(mode: str, **variables: str) -> int:
        command = [sys.executable, "-c", ARENAS, mode, str(2 * limit)]
        environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | variables)
        return done.stdout.count("<heap nr=")

    assert count_arenas("limited") <= limit < count_arenas("unlimited")
    assert count_arenas("limited", MALLOC_ARENA_MAX=str(8 * limit)) > limit, "the variable takes precedence"
