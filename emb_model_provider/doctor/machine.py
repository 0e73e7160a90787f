"""Checks of the machine: Python, packages, processor, memory, CUDA and the directories that the service writes to."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from emb_model_provider.doctor import CheckResult
from emb_model_provider.errors import HubError
from emb_model_provider.formatting import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.doctor import Level
    from emb_model_provider.settings import Settings

_ROOT = Path("/")
_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm",
)  # fmt: skip
"""Features that make models fast."""
_LOW_MEMORY = 1_000_000_000
_NO_LIMIT = 1 << 60
_LOW_DISK, _FULL_DISK = 5_000_000_000, 500_000_000
_TORCH_TIMEOUT_S = 120.0
_PRINT_DEVICE = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"


# --- Python, processor and memory ---------------------------------------------------------------------


def check_python() -> Iterator[CheckResult]:
    """Check the interpreter, and the packages that serve, compile and download models."""
    from emb_model_provider.artifacts.recipe import QUANTIZER, RUNTIME_PACKAGES, TOOL_PACKAGES, installed_version

    python = f"{platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}"
    yield CheckResult("python", "ok", python)
    consequences: dict[str, tuple[Level, str]] = {
        **dict.fromkeys(RUNTIME_PACKAGES, ("fail", "compiled models cannot be served")),
        **dict.fromkeys(TOOL_PACKAGES, ("warn", "models cannot be compiled here, nor served by torch")),
        QUANTIZER: ("warn", "models cannot be compiled at int8 and int4 here"),
        "huggingface-hub": ("warn", "models cannot be downloaded from this hub"),
        "modelscope-hub": ("warn", "models cannot be downloaded from this hub"),
    }
    versions = {name: installed_version(name) for name in ("emb-model-provider", *consequences)}
    installed = ", ".join(f"{name} {found}" for name, found in versions.items() if found is not None)
    yield CheckResult("packages", "ok", installed)
    for name, (level, consequence) in consequences.items():
        if versions[name] is None:
            yield CheckResult(name, level, f"not installed: {consequence}", f"pip install {name}")


def check_processor(root: Path = _ROOT) -> CheckResult:
    """Check how many processors this process may use, and their features. `root` contains `proc` and `sys`."""
    from emb_model_provider.backends.hardware import cgroup_cpu_limit, usable_cpus

    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _read_cpuinfo(root), re.MULTILINE)
    known = set(flags[1].split()) if flags is not None else set()
    limit = cgroup_cpu_limit(root)
    found = f"{processor_name(root) or platform.machine()}, {usable_cpus(root)} usable cores"
    if limit is not None:
        found += f" (limited to {limit:g} CPUs)"
    found = ", ".join((found, *(feature for feature in _FEATURES if feature in known)))
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if known and is_x86 and "avx2" not in known:
        advice = "Models run slowly without AVX2. Use a machine that has it."
        return CheckResult("processor", "warn", f"{found}; no AVX2", advice)
    if limit is not None and limit < 1:
        advice = "Give the container at least one CPU (docker run --cpus 1)."
        return CheckResult("processor", "warn", found, advice)
    return CheckResult("processor", "ok", found)


def check_memory(root: Path = _ROOT, memory: Any = None) -> CheckResult:
    """Check how much of `memory`, or of the memory of this machine, the process can use. `root` contains `sys`."""
    memory = memory or psutil.virtual_memory()
    available = memory.available
    found = f"{format_size(available)} of {format_size(memory.total)} available"
    limit = _memory_limit(root)
    if limit is not None and limit < memory.total:
        found += f", limited to {format_size(limit)} for this process"
        available = min(available, limit)
    if available >= _LOW_MEMORY:
        return CheckResult("memory", "ok", found)
    advice = (
        "A small model needs about 0.5 GB to be served and 2 GB to be compiled. Free some memory, or raise the limit."
    )
    return CheckResult("memory", "warn", found, advice)


def processor_name(root: Path = _ROOT) -> str:
    """Return the name of the processor's model; an empty string if it is unknown."""
    name = re.search(r"^model name\s*:\s*(.+)$", _read_cpuinfo(root), re.MULTILINE)
    return name[1].strip() if name is not None else platform.processor()


def _read_cpuinfo(root: Path) -> str:
    try:
        return (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _memory_limit(root: Path) -> int | None:
    """Return the limit of the control group (v2 or v1) that this process sees as its own, or None."""
    for path in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError):
            text = (root / path).read_text(encoding="ascii").strip()
            if text.isdecimal() and int(text) < _NO_LIMIT:
                return int(text)
    return None


# --- CUDA ---------------------------------------------------------------------------------------------


def check_cuda(settings: Settings) -> CheckResult:
    """Check for CUDA devices. PyTorch, which is slow to import, is used only if the driver reports one."""
    from emb_model_provider.backends.hardware import cuda_devices, cuda_problem, torch_is_cuda_build

    configured = sorted({spec.device for spec in settings.models.specs() if spec.device.startswith("cuda")})
    devices = cuda_devices()
    if not devices:
        return _no_device(configured)
    found = f"NVIDIA's driver reports {devices} device{'s' if devices > 1 else ''}"
    if not torch_is_cuda_build():
        advice = "Install a CUDA build of PyTorch, or set EMB_PROVIDER_DEVICE=cpu."
        found += ", but the installed PyTorch supports only CPUs"
        return CheckResult("cuda", "fail" if configured else "warn", found, advice)
    if problem := cuda_problem():
        return CheckResult(
            "cuda", "fail", f"{found}, but {problem.partition('. ')[0]}", f"{problem.partition('. ')[2]}."
        )
    name, reason = _device_of_torch()
    if name:
        return CheckResult("cuda", "ok", f"{found}; PyTorch can use {name}")
    advice = "Update the driver (nvidia-smi shows its version), or set EMB_PROVIDER_DEVICE=cpu."
    return CheckResult("cuda", "fail", f"{found}, but PyTorch finds none{reason}", advice)


def _no_device(configured: list[str]) -> CheckResult:
    if configured:
        advice = "Set EMB_PROVIDER_DEVICE to auto or cpu, or give this process a device (docker run --gpus all)."
        return CheckResult("cuda", "fail", f"no device, but {', '.join(configured)} is configured", advice)
    if Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia").exists():
        advice = "In a container: docker run --gpus all, and NVIDIA_DRIVER_CAPABILITIES=compute,utility."
        return CheckResult("cuda", "warn", "this machine has an NVIDIA device that this process cannot use", advice)
    return CheckResult("cuda", "ok", "no device: models run on the processor")


def _device_of_torch() -> tuple[str, str]:
    """Return the name of the first device, or an empty string and the reason."""
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, "-c", _PRINT_DEVICE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TORCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f" within {_TORCH_TIMEOUT_S:g} s"
    last_line = (done.stderr.strip().splitlines() or [""])[-1][:200]
    return done.stdout.strip(), f" ({last_line})" if done.returncode and last_line else ""


# --- directories --------------------------------------------------------------------------------------


def check_directories(settings: Settings) -> Iterator[CheckResult]:
    """Check the free space of caches and logs, and the permission to write them."""
    from emb_model_provider.hubs.caches import cache_root

    hubs, logs = settings.hubs, settings.logs
    yield _check_directory("cache", hubs.cache_dir, "EMB_PROVIDER_CACHE_DIR")
    directory = cache_root("huggingface", hubs.hf_cache_dir)
    yield _check_directory("cache of huggingface", directory, "EMB_PROVIDER_HF_CACHE_DIR")
    directory = cache_root("modelscope", hubs.modelscope_cache_dir)
    yield _check_directory("cache of modelscope", directory, "EMB_PROVIDER_MODELSCOPE_CACHE_DIR")
    if logs.log_to_file:
        yield _check_directory("log", logs.directory, "EMB_PROVIDER_LOG_DIR", small=True)


def _check_directory(name: str, directory: Path, setting: str, *, small: bool = False) -> CheckResult:
    from emb_model_provider.snapshots.files import require_writable

    directory = directory.expanduser().absolute()
    missing = [path for path in (directory, *directory.parents) if not _exists(path)]
    try:
        require_writable(directory, setting)
    except HubError as error:
        return CheckResult(name, "fail", f"{directory} is not writable", error.message)
    finally:
        for created in missing:  # the check leaves no directories behind
            with contextlib.suppress(OSError):
                created.rmdir()
    existing = next(path for path in (directory, *directory.parents) if _exists(path))
    free = shutil.disk_usage(existing).free
    found = f"{directory}, {format_size(free)} free"
    if free < _FULL_DISK:
        advice = (
            f"Free some space, or set {setting} to a directory on a larger disk. To see what can be removed: "
            "emb-provider list"
        )
        return CheckResult(name, "warn" if small else "fail", found, advice)
    if free < _LOW_DISK and not small:
        advice = f"A large model may not fit. Free some space (emb-provider prune), or set {setting}."
        return CheckResult(name, "warn", found, advice)
    return CheckResult(name, "ok", found)


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - pathlib raises if a parent is not accessible
