"""What this process may use of the processor: a container's share of it, not the host's count."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


_ROOT = Path("/")
_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
_ARM_BF16_FLAGS = {"bf16", "svebf16"}
_AMX_FLAG, _VNNI_FLAG = "amx_bf16", "avx512_vnni"


def usable_cpus(root: Path = _ROOT) -> int:
    """Return how many threads of computation this process can keep busy, at least 1.

    The processors it may be scheduled on, or its control group's CPU limit (v2 `cpu.max`, v1 `cpu.cfs_quota_us`)
    where that is less. A limit of 1.5 counts as 1: a second thread would only be throttled. `root` is where
    `/proc` and `/sys` are read.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        allowed = os.cpu_count() or 1
    limit = cgroup_cpu_limit(root)
    return max(1, allowed if limit is None else min(allowed, int(limit)))


def cgroup_cpu_limit(root: Path = _ROOT) -> float | None:
    """Return the lowest CPU limit among this process's control group and its ancestors, in CPUs, or None."""
    limits = [
        limit
        for read, mount, group in _groups(root)
        for directory in (mount / group, *(mount / group).parents)
        if directory.is_relative_to(mount) and (limit := read(directory)) is not None
    ]
    return min(limits, default=None)


def native_bf16(root: Path = _ROOT) -> bool:
    """Whether the processor multiplies bf16 numbers itself (AMX or AVX512-BF16; on ARM, its BF16 extension)."""
    return any(
        flags & (_BF16_FLAGS if kind == "flags" else _ARM_BF16_FLAGS) for kind, flags in _processors(root)
    )


def fast_int8(root: Path = _ROOT) -> bool:
    """Whether the processor is faster at integers than at anything else: AVX512-VNNI, and no AMX.

    With AMX, bf16 is faster than what OpenVINO makes of integer weights there.
    """
    return any(_VNNI_FLAG in flags and _AMX_FLAG not in flags for _, flags in _processors(root))


def _processors(root: Path) -> list[tuple[str, set[str]]]:
    """Return each processor's flags, and what the system calls them; none where it does not tell."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = re.findall(r"^(flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return [(kind, set(words.split())) for kind, words in lines]


def _groups(root: Path) -> list[tuple[Callable[[Path], float | None], Path, str]]:
    """Return, for v2 and v1, how to read a limit, where the hierarchy is mounted, and this process's group in it."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[tuple[Callable[[Path], float | None], Path, str]] = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        # Inside a container without a namespace of its own the path is the host's, and is not there:
        # then only the mount itself is read, which is the container's group.
        inside = "" if ".." in group else group.lstrip("/")
        if number == "0" and not controllers:
            found.append((_limit_v2, root / "sys/fs/cgroup", inside))
        elif "cpu" in controllers.split(","):
            found.append((_limit_v1, root / "sys/fs/cgroup" / controllers, inside))
            found.append((_limit_v1, root / "sys/fs/cgroup/cpu", inside))
    return found


def _limit_v2(directory: Path) -> float | None:
    words = _words(directory / "cpu.max")
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _limit_v1(directory: Path) -> float | None:
    quota, period = _words(directory / "cpu.cfs_quota_us"), _words(directory / "cpu.cfs_period_us")
    return _ratio(quota[0], period[0]) if quota and period else None


def _ratio(quota: str, period: str) -> float | None:
    # "max" (v2) and -1 (v1) mean no limit.
    if not quota.isdecimal() or not period.isdecimal() or not int(period):
        return None
    return int(quota) / int(period) or None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []


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
