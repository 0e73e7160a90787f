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

from emb_model_provider.backends.hardware import usable_cpus

_M_ARENA_MAX = -8
"""The parameter's number in glibc's malloc.h."""
_NEW_OBJECTS = 20_000
"""Between two collections. Requests leave next to no cycles: counting references frees what they made."""


def freeze_gc() -> None:
    """Take all objects of now out of later collections. Call it when a model has been loaded; takes tenths of a second."""
    # What an earlier call set aside may belong to a model that is gone: everything is looked at once more.
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, 10, 10)


def trim_malloc() -> None:
    """Let the system have what a model held that was closed; glibc keeps it for later, in pieces. Takes tenths of a second."""
    gc.unfreeze()
    gc.collect()
    # Not glibc: musl, macOS and Windows have no such function, or no way to look for it.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def limit_malloc_arenas() -> None:
    """Have glibc allocate from one arena for each thread that works at a time. Call it before threads are started.

    It gives every thread an arena of its own, up to eight a processor, and what is free in one is of no use to the others.
    Two processors keep two lanes and the event loop busy; over three arenas they answer as fast as over sixteen, within 2 %
    (two: 6 % less, at 16 connections with a short text each), and after eight loads, closed again, 281 MiB are resident and
    not 313. Who sets MALLOC_ARENA_MAX or GLIBC_TUNABLES has chosen otherwise.
    """
    if {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, usable_cpus() + 1)
