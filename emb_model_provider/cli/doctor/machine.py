"""Python, packages, the processor, memory and CUDA."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.cli.doctor import CheckResult
from emb_model_provider.formatting import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.cli.doctor import Level
    from emb_model_provider.settings import Settings

_ROOT = Path("/")
_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
)
_SHORT_OF_MEMORY = 1_000_000_000
_NO_LIMIT = 1 << 60
_TORCH_S = 120.0
_ASK_TORCH = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"


def check_python() -> Iterator[CheckResult]:
    found = f"{platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}"
    yield CheckResult("python", "ok", found)


def check_packages() -> Iterator[CheckResult]:
    """Look for what serves, what compiles and what fetches."""
    from emb_model_provider.artifacts.recipe import (
        QUANTIZER,
        RUNTIME_PACKAGES,
        TOOL_PACKAGES,
        installed_version,
    )

    hubs = ("huggingface-hub", "modelscope-hub")
    names = ("emb-model-provider", *RUNTIME_PACKAGES, *TOOL_PACKAGES, QUANTIZER, *hubs)
    versions = {name: installed_version(name) for name in names}
    here = ", ".join(f"{name} {found}" for name, found in versions.items() if found is not None)
    yield CheckResult("packages", "ok", here)
    consequences: dict[str, tuple[Level, str]] = {
        **dict.fromkeys(RUNTIME_PACKAGES, ("fail", "the compiled engine cannot run")),
        **dict.fromkeys(TOOL_PACKAGES, ("warn", "nothing can be compiled here, and torch cannot serve")),
        QUANTIZER: ("warn", "int8 and int4 cannot be compiled here"),
        **dict.fromkeys(hubs, ("warn", "its hub cannot be asked")),
    }
    for name, (level, what) in consequences.items():
        if versions[name] is None:
            yield CheckResult(name, level, f"not installed: {what}", f"pip install {name}")


def check_processor(root: Path = _ROOT) -> Iterator[CheckResult]:
    """Look at what may be used of it, and at what makes models quick."""
    from emb_model_provider.backends.hardware import cgroup_cpu_limit, usable_cpus

    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags is not None else set()
    features = [feature for feature in _FEATURES if feature in known]
    limit = cgroup_cpu_limit(root)
    cores = usable_cpus(root)
    limited = f" (a limit of {limit:g} CPUs)" if limit is not None else ""
    found = f"{name[1] if name is not None else platform.processor() or platform.machine()}, {cores} usable cores{limited}"
    if features:
        found += f", {', '.join(features)}"
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if known and is_x86 and "avx2" not in known:
        yield CheckResult(
            "processor", "warn", f"{found}; no AVX2", "Models run, but slowly: take a machine with AVX2."
        )
    elif limit is not None and limit < 1:
        advice = "Give the container a whole CPU at least (docker run --cpus 1)."
        yield CheckResult("processor", "warn", found, advice)
    else:
        yield CheckResult("processor", "ok", found)


def check_memory(root: Path = _ROOT) -> Iterator[CheckResult]:
    """Look at what is free, of the machine and of the control group."""
    available, total = _meminfo(root, "MemAvailable"), _meminfo(root, "MemTotal")
    if available is None or total is None:
        yield CheckResult("memory", "ok", "this system does not tell")
        return
    limit = _memory_limit(root)
    found = f"{format_size(available)} of {format_size(total)} free"
    if limit is not None and limit < total:
        found += f", a limit of {format_size(limit)} for this process"
        available = min(available, limit)
    if available < _SHORT_OF_MEMORY:
        advice = (
            "A small model needs about 0.5 GB to serve and 2 GB to compile: free some, or raise the limit."
        )
        yield CheckResult("memory", "warn", found, advice)
    else:
        yield CheckResult("memory", "ok", found)


def check_cuda(settings: Settings) -> Iterator[CheckResult]:
    """Look for a device: by the driver, which is quick, and only where there is one through torch, which is not."""
    from emb_model_provider.backends.hardware import cuda_devices, torch_is_cuda_build

    wanted = sorted({spec.device for spec in settings.models.specs() if spec.device.startswith("cuda")})
    devices = cuda_devices()
    if not devices:
        yield _no_device(wanted)
        return
    found = f"{devices} device{'s' if devices > 1 else ''} by NVIDIA's driver"
    if not torch_is_cuda_build():
        level: Level = "fail" if wanted else "warn"
        advice = "Install a CUDA build of PyTorch, or set EMB_PROVIDER_DEVICE=cpu."
        yield CheckResult("cuda", level, f"{found}, but this PyTorch is built for CPUs only", advice)
        return
    name, trouble = _ask_torch()
    if name:
        yield CheckResult("cuda", "ok", f"{found}; PyTorch sees {name}")
    else:
        advice = "Update the driver (nvidia-smi shows its version) or set EMB_PROVIDER_DEVICE=cpu."
        yield CheckResult("cuda", "fail", f"{found}, but PyTorch sees none{trouble}", advice)


def _no_device(wanted: list[str]) -> CheckResult:
    if wanted:
        advice = "Set EMB_PROVIDER_DEVICE=auto or cpu, or give this process a device (docker run --gpus all)."
        return CheckResult("cuda", "fail", f"no device, and {', '.join(wanted)} is configured", advice)
    if Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia").exists():
        advice = "In a container: docker run --gpus all, and NVIDIA_DRIVER_CAPABILITIES=compute,utility."
        return CheckResult(
            "cuda", "warn", "this machine has an NVIDIA device, and this process cannot use it", advice
        )
    return CheckResult("cuda", "ok", "no device: models run on the processor")


def _ask_torch() -> tuple[str, str]:
    """Return the first device's name, or an empty string and why."""
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, "-c", _ASK_TORCH],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TORCH_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f" within {_TORCH_S:g} s"
    last = (done.stderr.strip().splitlines() or [""])[-1][:200]
    return done.stdout.strip(), f" ({last})" if done.returncode and last else ""


def _meminfo(root: Path, field: str) -> int | None:
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found is not None else None


def _memory_limit(root: Path) -> int | None:
    """Return the limit of the control group that this process sees as its own (v2, v1), or None."""
    for path in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = (root / path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < _NO_LIMIT:
            return int(text)
    return None
