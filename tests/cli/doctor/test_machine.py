"""The doctor's checks of processor, memory and directories."""

from __future__ import annotations

import platform
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest

from emb_model_provider.backends import hardware
from emb_model_provider.backends.hardware import CudaDriver
from emb_model_provider.doctor.machine import check_cuda, check_memory, check_processor, processor_name
from emb_model_provider.settings import Settings
from tests.cli.helpers import run_doctor

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


def test_the_memory_of_this_machine(tmp_path: Path) -> None:
    memory = check_memory(tmp_path)
    assert f"{psutil.virtual_memory().total / 1e9:.0f}"[:2] in memory.found


@pytest.mark.parametrize(("available", "level"), [(7 * GIB, "ok"), (GIB // 2, "warn")])
def test_little_available_memory_is_a_warning(available: int, level: str, tmp_path: Path) -> None:
    memory = check_memory(tmp_path, SimpleNamespace(available=available, total=8 * GIB))
    assert memory.level == level


@pytest.mark.parametrize("path", ["sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"])
def test_the_memory_limit_of_a_container_counts(path: str, tmp_path: Path) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text("300000000\n", encoding="ascii")
    memory = check_memory(tmp_path, SimpleNamespace(available=7 * GIB, total=8 * GIB))
    assert memory.level == "warn"
    assert memory.found == "7.5 GB of 8.6 GB available, limited to 300 MB for this process"


def test_the_processor_is_named(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: Old One\nflags\t\t: sse2 avx2\n", encoding="ascii")
    assert processor_name(tmp_path) == "Old One"
    processor = check_processor(tmp_path)
    assert processor.level == "ok"
    assert processor.found.startswith("Old One, ")
    assert processor.found.endswith(", avx2")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is a feature of x86")
def test_a_processor_without_avx2_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: Old One\nflags\t\t: sse2\n", encoding="ascii")
    processor = check_processor(tmp_path)
    assert processor.level == "warn"
    assert processor.found.endswith("; no AVX2")


def test_a_cpu_limit_below_1_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n", encoding="ascii")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n", encoding="ascii")
    processor = check_processor(tmp_path)
    assert processor.level == "warn"
    assert "1 usable cores (limited to 0.5 CPUs)" in processor.found


@pytest.mark.parametrize("name", ["file/cache", "x" * 300], ids=["below a file", "name too long"])
def test_a_cache_that_is_not_writable_fails(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result names the directory and the setting. The other checks still run."""
    (here / "file").touch()
    monkeypatch.setenv("EMB_PROVIDER_CACHE_DIR", str(here / name))
    results = run_doctor(status=1)
    assert str(here / name) in results["cache"]["found"]
    assert "EMB_PROVIDER_CACHE_DIR" in results["cache"]["advice"]
    assert results["port"]["level"] == "ok"


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do, without importing PyTorch."""
    monkeypatch.setattr(hardware, "cuda_driver", lambda: CudaDriver((12, 2), ((8, 0),)))
    monkeypatch.setattr(hardware, "torch_is_cuda_build", lambda: True)
    monkeypatch.setattr(hardware, "torch_cuda_version", lambda: (13, 2))
    result = check_cuda(Settings.from_values())
    assert result.level == "fail"
    assert "1 device, but the NVIDIA driver is too old: it supports CUDA 12.2" in result.found
    assert result.advice == "Update the driver, or install a build of PyTorch for CUDA 12."
