"""Python's garbage collector, set up for a service: it must not look at models again and again.

As it comes, it runs after every 700 new objects, and now and then looks at every object of the process. Under load
that was a quarter of the event loop's time (py-spy, 64 connections), and nearly all that it looked at were the
objects of libraries and models, which stay.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os

_FEWEST_ARENAS = 2
_M_ARENA_MAX = -8
"""The parameter's number in glibc's malloc.h."""
_NEW_OBJECTS = 20_000
"""Between two collections. Requests leave next to no cycles: counting references frees what they made."""


def spare_what_stays() -> None:
    """Take all objects of now out of later collections. Call it when a model has been loaded; takes tenths of a second."""
    # What an earlier call set aside may belong to a model that is gone: everything is looked at once more.
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, 10, 10)


def give_back_memory() -> None:
    """Let the system have what a model held that was closed; glibc keeps it for later, in pieces. Takes tenths of a second."""
    gc.unfreeze()
    gc.collect()
    # Not glibc: musl, macOS and Windows have no such function, or no way to look for it.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_memory_together() -> None:
    """Have glibc allocate from one arena a processor. Call it before threads are started.

    It gives each thread an arena of its own, up to eight a processor, and what is free in one is of no use to the others:
    loading and closing a model eight times left 296 MiB with 78 in use, against 238 and no more with two arenas, on two
    processors. It costs 6 % of the rate at 16 connections with a short text each, 1 % with 32 texts a request. Who sets
    MALLOC_ARENA_MAX or GLIBC_TUNABLES has chosen otherwise.
    """
    if {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, max(_FEWEST_ARENAS, os.cpu_count() or 1))
