"""Is there a CUDA device that torch would use? Answered without importing torch, which takes seconds."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

_DRIVERS = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
_TORCH_CUDA = ("libtorch_cuda.so", "torch_cuda.dll")


def has_cuda() -> bool:
    """Whether PyTorch is a CUDA build and the driver shows it a device (CUDA_VISIBLE_DEVICES is honoured)."""
    return torch_is_cuda_build() and cuda_devices() > 0


def torch_is_cuda_build() -> bool:
    """Whether the installed PyTorch brings its CUDA library."""
    found = importlib.util.find_spec("torch")  # of a top-level package: located, not imported
    places = (found.submodule_search_locations or ()) if found is not None else ()
    return any((Path(place) / "lib" / name).exists() for place in places for name in _TORCH_CUDA)


def cuda_devices() -> int:
    """Return how many devices NVIDIA's driver shows this process; 0 where there is no driver."""
    for name in _DRIVERS:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0
