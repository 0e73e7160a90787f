"""What processes and the machine use, from /proc (Linux)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS_S = 1 / os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds used so far."""

    tree_s: float
    machine_s: float

    def since(self, earlier: Usage) -> Usage:
        return Usage(self.tree_s - earlier.tree_s, self.machine_s - earlier.machine_s)


def process_tree(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    tree = [pid]
    for member in tree:
        tree.extend(children.get(member, ()))
    return tree


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process tree, in MiB. Pages that members share count for each."""
    total = 0
    for member in process_tree(pid):
        try:
            status = (_PROC / str(member) / "status").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return total / 1024


def usage(pid: int) -> Usage:
    """Return the CPU time of a process tree, ended children included, and of the whole machine."""
    tree = sum(
        sum(int(ticks) for ticks in fields[11:15])
        for member in process_tree(pid)
        if (fields := _stat(member))
    )
    # user, nice, system, irq, softirq, steal: all that is neither idle nor waiting for a disk.
    ticks = [int(value) for value in (_PROC / "stat").read_text().splitlines()[0].split()[1:9]]
    return Usage(tree * _TICKS_S, (sum(ticks) - ticks[3] - ticks[4]) * _TICKS_S)


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat that follow the command's name, which may hold anything."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
