"""The journal of the transfers between two repositories: one JSON object per line, only ever appended."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.hubs.transfer import RemoteFile
    from emb_model_provider.transfer.location import Location

logger = logging.getLogger(__name__)

State = Literal["created", "hashed", "uploaded", "committed", "verified", "failed"]


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """What happened to a file, or to the whole repository if `path` is empty."""

    state: State
    path: str = ""
    size: int = 0
    sha256: str = ""
    git_sha1: str = ""
    error: str = ""


class TransferJournal:
    """What earlier transfers between two repositories did. Thread-safe.

    The journal saves work, and decides nothing: whether the destination has a file is only what the destination lists.
    It contains the hashes of files for which the hubs list different kinds, and whether a transfer created the
    destination. A line that a killed process left incomplete is ignored.
    """

    def __init__(self, directory: Path, source: Location, destination: Location) -> None:
        self._pair = (f"{source.site}:{source.name}", f"{destination.site}:{destination.name}")
        name = hashlib.sha256("\0".join(self._pair).encode()).hexdigest()[:24]
        self.path = directory / f"{name}.jsonl"
        self._lock = threading.Lock()
        self._is_reported = False
        self._known: dict[tuple[str, int], tuple[str, str]] = {}
        """Both hashes of files, by one of them and the size."""
        self.has_created = False
        """Whether a transfer created the destination and did not end, so that its card is not the work of its owner."""
        for entry in self._read():
            self._learn(entry)

    def complete(self, file: RemoteFile) -> RemoteFile:
        """Return a file of the source with the hashes that its hub does not list, if an earlier transfer computed them."""
        known = self._known.get((file.sha256 or file.git_sha1 or "", file.size))
        return replace(file, sha256=known[0], git_sha1=known[1]) if known is not None else file

    def append(self, revision: str, entry: JournalEntry) -> None:
        """Add an entry. A journal that cannot be written is reported once, and the transfer continues."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"time": now, "source": self._pair[0], "destination": self._pair[1], "commit": revision, **asdict(entry)}
        text = json.dumps({name: value for name, value in line.items() if value not in ("", 0)}, ensure_ascii=False)
        with self._lock:
            self._learn(entry)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as stream:
                    # A killed process can have left half of a line.
                    start = b"" if self._ends_with_newline() else b"\n"
                    stream.write(start + text.encode() + b"\n")
            except OSError as error:
                if not self._is_reported:
                    self._is_reported = True
                    logger.warning(
                        "The journal %s cannot be written (%s): a later run reads small files again.",
                        self.path,
                        error.strerror,
                    )

    def _learn(self, entry: JournalEntry) -> None:
        if entry.git_sha1 and entry.sha256:
            for key in (entry.git_sha1, entry.sha256):
                self._known[key, entry.size] = (entry.sha256, entry.git_sha1)
        if entry.state == "created":
            self.has_created = True
        elif entry.state == "verified":
            self.has_created = False

    def _read(self) -> list[JournalEntry]:
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return []
        return [entry for line in lines if (entry := _parse(line)) is not None]

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as stream:
            if stream.seek(0, os.SEEK_END) == 0:
                return True
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"


def _parse(line: bytes) -> JournalEntry | None:
    try:
        values: Any = json.loads(line)
        return JournalEntry(
            state=values["state"],
            path=str(values.get("path", "")),
            size=int(values.get("size", 0)),
            sha256=str(values.get("sha256", "")),
            git_sha1=str(values.get("git_sha1", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
