"""Settings of Python's garbage collector and of malloc for a service that holds large models."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os

from emb_model_provider.backends.hardware import usable_cpus

_M_ARENA_MAX = -8
"""Number of the parameter in glibc's malloc.h."""
_GC_THRESHOLD = 20_000
"""New objects between two collections. Requests create hardly any cycles, so reference counting frees nearly all."""


def freeze_gc() -> None:
    """Exclude all present objects from later collections, and collect less often. Takes tenths of a second.

    Otherwise the collector scans the objects of libraries and models again and again, which takes a quarter of the
    event loop's time under load (see docs/performance.md).
    """
    # Objects frozen by an earlier call may belong to a model that has been unloaded, so they are collected too. Not while a
    # service starts, which has disabled the collector, because hardly anything that is imported is garbage.
    if gc.isenabled():
        gc.unfreeze()
        gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(_GC_THRESHOLD, 10, 10)


def trim_malloc() -> None:
    """Return the memory of a closed model to the system, because glibc keeps it. Takes tenths of a second."""
    gc.unfreeze()
    gc.collect()
    # musl, macOS and Windows have no malloc_trim, or cannot look it up.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def limit_malloc_arenas() -> None:
    """Limit glibc's malloc to one arena per processor and one more. Call it before threads are started.

    The free memory of an arena is not available to threads with another one. By default there are eight arenas per
    processor. The limit costs no throughput (see docs/performance.md).
    """
    if {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, usable_cpus() + 1)
