"""What the collector sets aside when a model is loaded."""

from __future__ import annotations

import gc
import weakref

from emb_model_provider.serving.garbage import spare_what_stays


class _Node:
    def __init__(self) -> None:
        self.itself = self


def test_a_model_that_is_gone_is_freed_when_the_next_is_loaded() -> None:
    """Objects in a cycle were set aside with everything else; once nobody holds them they do not stay for ever."""
    before = gc.get_threshold()
    try:
        node = _Node()
        gone = weakref.ref(node)
        spare_what_stays()
        assert gc.get_freeze_count() > 0
        del node
        spare_what_stays()
        assert gone() is None
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
