"""Locks are not waited for without bound."""

from __future__ import annotations

import threading

import pytest

from emb_model_provider.concurrency import BoundedLock


def test_a_lock_that_is_held_for_too_long_is_an_error() -> None:
    """The message says what holds it. After it is released, it can be locked again."""
    lock = BoundedLock(0.05, "another model has been loading")
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    with pytest.raises(TimeoutError, match=r"another model has been loading for more than 0\.05 s"), lock:
        pass
    release.set()
    thread.join(60)
    with lock:
        pass
