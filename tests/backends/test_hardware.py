"""Processors and their features are read from the files of the system."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.backends.hardware import cgroup_cpu_limit, fast_int8, free_memory, native_bf16, usable_cpus

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
