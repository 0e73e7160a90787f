"""The torch backend. Imported only if torch serves a model.

Importing this package imports sentence-transformers, so that its modules cannot do so without `quiet_imports`.
"""

from __future__ import annotations

import logging
import os
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
def quiet_imports(*hidden: str) -> Iterator[None]:
    """Silence the import of torchao (which transformers imports, if it is installed) and bitsandbytes.

    Their deprecation warnings do not concern the operator. And on some CPUs, bitsandbytes downloads code from a
    Hugging Face repository when it is imported and the package `kernels` is installed. That code is not verified, and
    must not be downloaded by an offline service, so `kernels` is hidden, and further packages on request.
    """
    with _LOCK, warnings.catch_warnings(action="ignore"):
        levels = {name: logging.getLogger(name).level for name in _LOGGERS}
        absent = [name for name in ("kernels", *hidden) if name not in sys.modules]
        for name in absent:
            sys.modules[name] = None  # type: ignore[assignment]  # makes its import fail
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            for name in absent:
                sys.modules.pop(name, None)


# Batches of all sizes would leave the memory of a GPU in pieces. PyTorch reads it when it is imported.
if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# PEFT, which transformers imports, would import bitsandbytes, which only int4 needs.
with quiet_imports("bitsandbytes"):
    import sentence_transformers  # noqa: F401
