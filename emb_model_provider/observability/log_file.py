"""The log file: it is rotated, and survives full disks and the removal of its directory."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_RETRY_ROTATION_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """When a new log file is started, and how many old ones are kept."""

    max_bytes: int = 20 * 1024 * 1024
    max_age_s: float = 24 * 3600.0
    kept_files: int = 7
    retry_after_s: float = _RETRY_ROTATION_S
    """How long an attempt that failed is not repeated."""


class LogFile:
    """A file for log lines. If the operating system rejects them, it drops them, and `problem` says why."""

    def __init__(self, path: Path, rotation: Rotation) -> None:
        """Open the file, and create its directory. Raises OSError."""
        self.missing = 0
        """Lines that were dropped since the last call of `write` that found no problem."""
        self.path = path
        self._rotation = rotation
        self._write_problem = self._rotation_problem = ""
        self._no_rotation_before = 0.0
        self._descriptor: int | None = None
        self._open()

    @property
    def problem(self) -> str:
        """What does not work at the moment; empty if everything does."""
        return self._write_problem or self._rotation_problem

    def write(self, lines: Iterable[tuple[str, float]]) -> None:
        """Append lines, each with the time at which it was logged, and start new files as often as necessary."""
        remaining = [(f"{line}\n".encode("utf-8", "backslashreplace"), created) for line, created in lines]
        if not self.problem:
            self.missing = 0
        try:
            self._open_again_if_removed()
            pending = b""
            for line, created in remaining:
                if self._is_rotation_due(self._size + len(pending), len(line), created):
                    self._append(pending)
                    pending = b""
                    self._rotate(created)
                pending += line
            self._append(pending)
            self._write_problem = ""
        except OSError as error:
            self.missing += len(remaining)
            self._write_problem = f"cannot be written ({error.strerror})"

    def close(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(
            self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666
        )
        status = os.fstat(self._descriptor)
        self._is_at_line_start = True
        self._size = status.st_size
        if self._size:
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                self._is_at_line_start = file.read(1) == b"\n"
        # The age of an existing file is counted from its last line, because the time of its first line is unknown.
        self._started = status.st_mtime if status.st_size else time.time()

    def _open_again_if_removed(self) -> None:
        if self._descriptor is not None:
            with suppress(FileNotFoundError):
                if os.path.samestat(self.path.stat(), os.fstat(self._descriptor)):
                    return
            self.close()
        self._open()

    def _append(self, data: bytes) -> None:
        if not data or self._descriptor is None:
            return
        if not self._is_at_line_start:  # a full disk has cut the last line
            data = b"\n" + data
        while data:
            written = os.write(self._descriptor, data)
            self._is_at_line_start = data[:written].endswith(b"\n")
            self._size += written
            data = data[written:]

    def _is_rotation_due(self, size: int, more_bytes: int, created: float) -> bool:
        if not size or created < self._no_rotation_before:
            return False
        return size + more_bytes > self._rotation.max_bytes or created - self._started > self._rotation.max_age_s

    def _rotate(self, now: float) -> None:
        """Rename the files, and start a new one. Nothing is renamed or removed if a new file cannot be created."""
        new = self.path.with_name(f"{self.path.name}.new")
        try:
            new.write_bytes(b"")
            self.close()
            files = [
                self.path,
                *(self.path.with_name(f"{self.path.name}.{n + 1}") for n in range(self._rotation.kept_files)),
            ]
            for older, newer in zip(reversed(files), reversed(files[:-1]), strict=False):
                if newer.exists():
                    newer.replace(older)
            new.replace(self.path)
            self._rotation_problem = ""
        except OSError as error:
            self._no_rotation_before = now + self._rotation.retry_after_s
            self._rotation_problem = f"cannot be rotated ({error.strerror}), and grows"
        if self._descriptor is None:
            self._open()
