"""The results of transfers, as Python, JSON and the command line show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

State = Literal["done", "same", "planned", "differs", "failed", "skipped"]
"""done: files were sent, and the destination was verified. same: the destination has all files. planned: a dry run.
differs: files are missing or different. failed: see `error`. skipped: an earlier repository failed, with fail_fast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferResult:
    """What happened to one repository."""

    source: str
    destination: str
    state: State
    revision: str | None = None
    """Commit, branch or tag of the source."""
    created: bool = False
    """Whether the destination was created, or in a dry run would be."""
    files: int = 0
    """Number of files of the source."""
    sent: tuple[str, ...] = ()
    """Files that were committed, or in a dry run would be."""
    sent_bytes: int = 0
    """Bytes that were sent; in a dry run, that would be sent at most."""
    same: int = 0
    """Number of files that the destination had already."""
    kept: tuple[str, ...] = ()
    """Files whose own version, or front matter, the destination kept."""
    extra: tuple[str, ...] = ()
    """Files that only the destination has."""
    missing: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    error: str | None = None
    error_code: str | None = None
    exit_code: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.state in ("done", "same", "planned")

    def to_json(self) -> dict[str, Any]:
        """Return the result with the names of the JSON output."""
        return {
            "source": self.source,
            "destination": self.destination,
            "state": self.state,
            "revision": self.revision,
            "created": self.created,
            "files": self.files,
            "sent": list(self.sent),
            "sent_bytes": self.sent_bytes,
            "same": self.same,
            "kept": list(self.kept),
            "extra": list(self.extra),
            "missing": list(self.missing),
            "different": list(self.different),
            "error": self.error,
            "error_code": self.error_code,
            "seconds": round(self.seconds, 3),
        }


def summary(results: list[TransferResult]) -> dict[str, Any]:
    """Return the JSON of all results: the output of `--json`, and the content of a report."""
    return {
        "ok": all(result.ok for result in results),
        "succeeded": sum(result.ok for result in results),
        "failed": sum(not result.ok for result in results),
        "sent_bytes": sum(result.sent_bytes for result in results),
        "transfers": [result.to_json() for result in results],
    }
