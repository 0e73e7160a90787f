"""The processors and accelerators that this process can use. In a container these are its share of the host's."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

_ROOT = Path("/")
_BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16", "svebf16"}
"""Of x86 and of ARM."""
_AMX_FLAG, _VNNI_FLAG = "amx_bf16", "avx512_vnni"
_PROCESSOR_FIELDS = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
"""Lines of /proc/cpuinfo that name a processor, on x86 or ARM. The name alone is often only that of a product line."""
_DRIVERS = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
_TORCH_CUDA = ("libtorch_cuda.so", "torch_cuda.dll")
_CUDA_VERSION = re.compile(r"^cuda\s*(?::[^=]+)?=\s*'(\d+)\.(\d+)'", re.MULTILINE)
"""In `torch/version.py`."""
_FIRST_DRIVERS = {11: "450", 12: "525", 13: "580"}
"""The first driver on Linux for each major version of CUDA."""
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
"""Attributes of devices in cuda.h."""
_LOWEST_CAPABILITIES = {13: (7, 5)}
"""The oldest devices for which a major version of CUDA compiles kernels."""


@dataclass(frozen=True, slots=True)
class CudaDriver:
    """What NVIDIA's driver offers this process, which depends on CUDA_VISIBLE_DEVICES."""

    version: tuple[int, int]
    """The newest version of CUDA that it supports."""
    capabilities: tuple[tuple[int, int], ...]
    """Compute capability of each device."""


def usable_cpus(root: Path = _ROOT) -> int:
    """Return how many computing threads this process can keep busy, at least 1.

    This is the number of processors that it may run on, or the CPU limit of its control group (`cpu.max` in v2,
    `cpu.cfs_quota_us` in v1) or OMP_NUM_THREADS if that is lower. A limit of 1.5 counts as 1, because a second thread would
    be throttled. Ray sets OMP_NUM_THREADS to the processors of each of its workers, which share a machine.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        allowed = os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if threads.isdecimal() and int(threads) > 0:
        allowed = min(allowed, int(threads))
    limit = cgroup_cpu_limit(root)
    return max(1, allowed if limit is None else min(allowed, int(limit)))


def cgroup_cpu_limit(root: Path = _ROOT) -> float | None:
    """Return the lowest CPU limit of this process's control group and its ancestors, in CPUs; None without a limit."""
    limits = (_cpu_limit(directory) for directory in _cgroups(root, "cpu"))
    return min((limit for limit in limits if limit is not None), default=None)


def free_memory(root: Path = _ROOT) -> int:
    """Return the bytes that this process can still allocate within the machine and its control groups (v1 and v2).

    A process that exceeds them is killed. Cached files count as free, because the system drops them first.
    """
    free = (_free_memory(directory) for directory in _cgroups(root, "memory"))
    return min([int(psutil.virtual_memory().available), *(each for each in free if each is not None)])


def total_memory(root: Path = _ROOT) -> int:
    """Return the memory of the machine, or the limit of the container if that is lower, in bytes."""
    import psutil  # here, because the command line imports this module

    total = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max" means no limit
        total = min(total, int((root / "sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total


def native_bf16(root: Path = _ROOT) -> bool:
    """Return whether the processor multiplies bf16 numbers natively: AMX, AVX512-BF16, or BF16 on ARM."""
    return any(flags & _BF16_FLAGS for flags in _cpu_flags(root))


def fast_int8(root: Path = _ROOT) -> bool:
    """Return whether the processor is fastest at 8-bit integers, which is so with AVX512-VNNI and without AMX.

    With AMX, bf16 is faster than OpenVINO's computation with integers.
    """
    return any(_VNNI_FLAG in flags and _AMX_FLAG not in flags for flags in _cpu_flags(root))


def processor(root: Path = _ROOT) -> str:
    """Return a name of the processor that is the same on all machines on which the same options are fastest."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    parts = [re.search(rf"^{name}\s*:\s*(.*?)\s*$", text, re.MULTILINE) for name in _PROCESSOR_FIELDS]
    name = " ".join(part.group(1) for part in parts if part is not None) or platform.processor() or platform.machine()
    return f"{name}, {usable_cpus(root)} processors"


def has_cuda() -> bool:
    """Return whether PyTorch is a CUDA build and can use a device, without importing PyTorch."""
    return torch_is_cuda_build() and cuda_devices() > 0 and not cuda_problem()


def cuda_problem() -> str:
    """Return why PyTorch cannot use the CUDA devices of this machine, and what to do; empty if there are none or it can."""
    driver, built_for = cuda_driver(), torch_cuda_version()
    if driver is None or not driver.capabilities or built_for is None:
        return ""
    return describe_cuda_problem(driver, built_for)


def describe_cuda_problem(driver: CudaDriver, built_for: tuple[int, int]) -> str:
    """Return why a build of PyTorch for a CUDA version cannot use the devices of a driver; empty if it can.

    A driver supports all builds for its own major version of CUDA, and older ones.
    """
    major = built_for[0]
    if driver.version[0] < major:
        needed = f", which needs driver {_FIRST_DRIVERS[major]} or newer" if major in _FIRST_DRIVERS else ""
        return (
            f"the NVIDIA driver is too old: it supports CUDA {_dotted(driver.version)}, and PyTorch is built for CUDA "
            f"{_dotted(built_for)}{needed}. Update the driver, or install a build of PyTorch for CUDA {driver.version[0]}"
        )
    lowest = _LOWEST_CAPABILITIES.get(major, (0, 0))
    if max(driver.capabilities) < lowest:
        return (
            f"the GPU is too old: it has compute capability {_dotted(max(driver.capabilities))}, and PyTorch for CUDA "
            f"{_dotted(built_for)} has kernels from {_dotted(lowest)}. Install a build of PyTorch for an older CUDA version"
        )
    return ""


def torch_cuda_version() -> tuple[int, int] | None:
    """Return the CUDA version that the installed PyTorch is built for, without importing it; None if for none."""
    spec = importlib.util.find_spec("torch")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        with contextlib.suppress(OSError):
            match = _CUDA_VERSION.search((Path(location) / "version.py").read_text(encoding="utf-8"))
            if match is not None:
                return int(match[1]), int(match[2])
    return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def torch_is_cuda_build() -> bool:
    """Return whether the installed PyTorch contains its CUDA library."""
    spec = importlib.util.find_spec("torch")  # locates a top-level package without importing it
    locations = (spec.submodule_search_locations or ()) if spec is not None else ()
    return any((Path(location) / "lib" / name).exists() for location in locations for name in _TORCH_CUDA)


def cuda_devices() -> int:
    """Return the number of devices that NVIDIA's driver offers this process."""
    driver = cuda_driver()
    return len(driver.capabilities) if driver is not None else 0


def cuda_driver() -> CudaDriver | None:
    """Return what NVIDIA's driver offers this process, or None if there is no driver or it does not work."""
    for name in _DRIVERS:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        count, version = ctypes.c_int(0), ctypes.c_int(0)
        if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
            continue
        library.cuDriverGetVersion(ctypes.byref(version))
        capabilities = tuple(
            (_attribute(library, index, _CAPABILITY_MAJOR), _attribute(library, index, _CAPABILITY_MINOR))
            for index in range(count.value)
        )
        return CudaDriver((version.value // 1000, version.value % 1000 // 10), capabilities)
    return None


def _attribute(library: ctypes.CDLL, device: int, attribute: int) -> int:
    value = ctypes.c_int(0)
    # A device is the number of its index.
    library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value


def _cpu_flags(root: Path) -> list[set[str]]:
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [set(flags.split()) for flags in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)]


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Return the directories of the control groups that a controller applies to this process, with their ancestors."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        # In a container without its own namespace the path is that of the host and does not exist. Then only the
        # mount point is read, which is the group of the container.
        inside = "" if ".." in group else group.lstrip("/")
        mounts: tuple[str, ...] = ()
        if number == "0" and not controllers:
            mounts = ("",)
        elif controller in controllers.split(","):
            mounts = (controllers, controller)
        for mount in (root / "sys/fs/cgroup" / name for name in mounts):
            found += [each for each in (mount / inside, *(mount / inside).parents) if each.is_relative_to(mount)]
    return found


def _cpu_limit(directory: Path) -> float | None:
    values = _read_values(directory / "cpu.max") or [
        *_read_values(directory / "cpu.cfs_quota_us"),
        *_read_values(directory / "cpu.cfs_period_us"),
    ]
    # "max" (v2) and -1 (v1) mean no limit.
    if len(values) != 2 or not all(value.isdecimal() for value in values) or not int(values[1]):
        return None
    return int(values[0]) / int(values[1]) or None


def _free_memory(directory: Path) -> int | None:
    """Return how much more memory a control group may use, in bytes; None without a limit."""
    v2 = [*_read_values(directory / "memory.max"), *_read_values(directory / "memory.current")]
    v1 = [*_read_values(directory / "memory.limit_in_bytes"), *_read_values(directory / "memory.usage_in_bytes")]
    values = v2 or v1
    if len(values) != 2 or not all(value.isdecimal() for value in values):  # "max" means no limit
        return None
    names = ("inactive_file", "active_file") if v2 else ("total_inactive_file", "total_active_file")
    statistics = _read_values(directory / "memory.stat")
    cached = sum(int(size) for name, size in zip(statistics[::2], statistics[1::2], strict=False) if name in names)
    return max(0, int(values[0]) - int(values[1]) + cached)


def _read_values(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []
