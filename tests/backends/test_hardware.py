"""Processors and their features are read from the files of the system."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.backends.hardware import (
    CudaDriver,
    cgroup_cpu_limit,
    describe_cuda_problem,
    fast_int8,
    free_memory,
    native_bf16,
    torch_cuda_version,
    usable_cpus,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"sys/fs/cgroup/cpu.max": "150000 100000", "proc/self/cgroup": "0::/"}, 1.5),
        ({"sys/fs/cgroup/cpu.max": "max 100000", "proc/self/cgroup": "0::/"}, None),
        (
            {
                "sys/fs/cgroup/a/cpu.max": "400000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "proc/self/cgroup": "0::/a/b",
            },
            4.0,
        ),
        ({"sys/fs/cgroup/cpu.max": "50000 100000", "proc/self/cgroup": "0::/not/mounted/here"}, 0.5),
        (
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
                "proc/self/cgroup": "4:cpu,cpuacct:/\n1:name=systemd:/",
            },
            3.0,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "proc/self/cgroup": "4:cpu:/docker/abc",
            },
            None,
        ),
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "nonsense", "proc/self/cgroup": "0::/"}, None),
    ],
)
def test_the_cpu_limit_of_the_control_group(files: dict[str, str], limit: float | None, tmp_path: Path) -> None:
    """v2 and v1, nested groups, a group that is not mounted, no limit, and invalid files."""
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert cgroup_cpu_limit(tmp_path) == limit
    allowed = len(os.sched_getaffinity(0))
    assert usable_cpus(tmp_path) == (allowed if limit is None else max(1, min(allowed, int(limit))))


@pytest.mark.parametrize(("value", "limited"), [("1", True), ("1,2", True), ("", False), ("0", False), ("many", False)])
def test_omp_num_threads_limits_the_threads(
    value: str, limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it limits torch; a value that is not a number is ignored."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert usable_cpus(tmp_path) == (1 if limited else 3)


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 sve\n", True),
        ("", False),
    ],
)
def test_native_bf16_depends_on_the_flags(cpuinfo: str, native: bool, tmp_path: Path) -> None:
    """AMX, AVX512-BF16, or BF16 on ARM. AVX512 alone only emulates it."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert native_bf16(tmp_path) is native
    assert native_bf16(tmp_path / "elsewhere") is False


@pytest.mark.parametrize(
    ("flags", "fast"),
    [("avx512_vnni avx512_bf16", True), ("avx512_vnni", True), ("avx512_vnni amx_bf16", False), ("avx2", False)],
)
def test_int8_is_fast_with_vnni_and_without_amx(flags: str, fast: bool, tmp_path: Path) -> None:
    """It is not if the flags cannot be read."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\n")
    assert fast_int8(tmp_path) is fast
    assert fast_int8(tmp_path / "elsewhere") is False


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (
            {
                "proc/self/cgroup": "0::/a",
                "sys/fs/cgroup/a/memory.max": "max",
                "sys/fs/cgroup/a/memory.current": "900",
                "sys/fs/cgroup/memory.max": "5000",
                "sys/fs/cgroup/memory.current": "2000",
                "sys/fs/cgroup/memory.stat": "anon 1000\ninactive_file 300\nactive_file 100\n",
            },
            3400,
        ),
        (
            {
                "proc/self/cgroup": "6:memory:/docker/abc",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "4990",
                "sys/fs/cgroup/memory/memory.stat": "cache 1\ntotal_inactive_file 20\ntotal_active_file 30\n",
            },
            60,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "1", "sys/fs/cgroup/memory.current": "5"}, 0),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"}, None),
        ({}, None),
    ],
)
def test_free_memory_is_bounded_by_the_control_group(files: dict[str, str], free: int | None, tmp_path: Path) -> None:
    """v2 with a limit of an ancestor, v1, an exceeded limit, and no limit. Cached files are free."""
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    if free is None:
        assert free_memory(tmp_path) > 10**6
    else:
        assert free_memory(tmp_path) == free


# --- CUDA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "built_for", "problem"),
    [
        (
            CudaDriver((12, 2), ((8, 0),)),
            (13, 2),
            "supports CUDA 12.2, and PyTorch is built for CUDA 13.2, which needs driver 580",
        ),
        (CudaDriver((13, 0), ((8, 0),)), (13, 2), ""),
        (CudaDriver((13, 0), ((9, 0),)), (12, 8), ""),
        (CudaDriver((13, 0), ((7, 0),)), (13, 2), "the GPU is too old: it has compute capability 7.0"),
        (CudaDriver((13, 0), ((6, 1), (7, 5))), (13, 2), ""),
        (CudaDriver((12, 4), ((7, 0),)), (12, 6), ""),
        (CudaDriver((13, 0), ((9, 0),)), (14, 0), "built for CUDA 14.0. Update the driver"),
    ],
)
def test_a_driver_or_gpu_that_is_too_old_for_pytorch(
    driver: CudaDriver, built_for: tuple[int, int], problem: str
) -> None:
    """A driver supports all builds for its own major version, and older ones."""
    described = describe_cuda_problem(driver, built_for)
    assert (problem in described) if problem else not described


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("cuda: Optional[str] = '13.2'", (13, 2)),
        ("cuda = '12.8'", (12, 8)),
        ("cuda: Optional[str] = None", None),
        ("", None),
    ],
)
def test_the_cuda_version_of_pytorch_is_read_without_importing_it(
    line: str, version: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build for CPUs has none."""
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it must not be imported')")
    (package / "version.py").write_text(f"__version__ = '2.15.0'\n{line}\nhip: Optional[str] = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    importlib.invalidate_caches()
    assert torch_cuda_version() == version


def test_the_installed_pytorch_names_its_cuda_version() -> None:
    """Otherwise a driver that is too old would not be noticed."""
    import torch

    expected = torch.version.cuda
    assert torch_cuda_version() == (None if expected is None else tuple(map(int, expected.split(".")[:2])))
