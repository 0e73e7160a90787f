"""Importing packages that speak to their developers while they are imported, or fetch code."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOGGERS = ("torch.utils._pytree", "torchao", "bitsandbytes.backends.cpu.ops")

_LOCK = threading.RLock()


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Import inside this what brings torchao (transformers does, where it is installed) or bitsandbytes.

    Their deprecation warnings are not the operator's. And on some CPUs bitsandbytes, where it finds the package
    `kernels`, takes code from a Hugging Face repository while it is imported: code that nobody checked, and that a
    service told to stay offline must not ask for.
    """
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        levels = {name: logging.getLogger(name).level for name in _LOGGERS}
        hidden = "kernels" not in sys.modules
        if hidden:
            sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's way to say: not to be imported
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if hidden:
                sys.modules.pop("kernels", None)
