"""What was derived from snapshots and is kept: artifacts, refusals and figures, to look at and to remove.

Serving finds its artifact through the store; this is for those who manage the disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emb_model_provider.compile.artifact import FILES, MANIFEST, read_fidelity
from emb_model_provider.compile.store import remove_artifact, sweep
from emb_model_provider.hubs.locks import Held, claim, is_held, remove_stale
from emb_model_provider.hubs.snapshot import hash_file
from emb_model_provider.hubs.storage import listed, write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from emb_model_provider.backends.base import Fidelity

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StockedArtifact:
    """An artifact that is there, by its manifest alone."""

    key: str
    snapshot: str
    """The digest of the snapshot that it was made from."""
    weights: str
    size: int
    """Bytes."""
    last_used: float
    """Unix time, seconds."""
    description: Mapping[str, Any]
    """As the manifest has it: a ModelDescription's values, without the tokenizer."""

    @property
    def computed(self) -> str:
        return str(self.description.get("compute") or self.description.get("precision"))

    @property
    def fidelity(self) -> Fidelity | None:
        values = self.description.get("fidelity")
        return read_fidelity(values) if values is not None else None


class Stock:
    """All that one cache directory holds of artifacts, refusals and figures."""

    def __init__(self, cache_dir: Path) -> None:
        self._root = cache_dir / "artifacts"
        self._figures = cache_dir / "fidelity"

    def artifacts(self) -> list[StockedArtifact]:
        """Return the artifacts whose manifests can be read, in the order of their keys."""
        found = (_read(path / MANIFEST) for path in listed(self._root) if path.name[0] != ".")
        return [artifact for artifact in found if artifact is not None]

    def is_held(self, key: str) -> bool:
        """Whether any process serves from an artifact, or makes it."""
        return is_held(self._root / f"{key}.hold") or is_held(self._root / f"{key}.lock")

    def claim(self, key: str, *, wait_s: float = 0.0) -> Held | None:
        """Have an artifact alone, to remove it; None where it is in use for longer than that. Raises: OSError."""
        return claim(self._root / f"{key}.hold", wait_s=wait_s)

    def remove(self, key: str) -> bool:
        """Remove a claimed artifact; return whether it is gone."""
        remove_stale(self._root / f"{key}.lock")
        return remove_artifact(self._root / key)

    def damage(self, key: str) -> str | None:
        """Hash an artifact's files; return what is wrong with it, or None. What is wrong is not served from again."""
        manifest = self._root / key / MANIFEST
        try:
            content = json.loads(manifest.read_bytes())
            if {entry["path"] for entry in content["files"]} != set(FILES):
                return "its manifest names other files"
            wrong = []
            for entry in content["files"]:
                if hash_file(self._root / key / entry["path"]).sha256 != entry["sha256"]:
                    wrong.append(entry["path"])
                    entry["mtime_ns"] = -1  # no file's: it is hashed again before it is used
            if wrong:
                with contextlib.suppress(OSError):
                    write_atomically(manifest, json.dumps(content, indent=1, ensure_ascii=False).encode())
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"it cannot be read: {error}"
        return f"{', '.join(wrong)} has other bytes" if wrong else None

    def notes_on(self, snapshots: set[str], *, others: bool = False) -> list[Path]:
        """Return the refusals and the figures of snapshots; `others`: those of all other snapshots.

        A file that does not say of which snapshot it is belongs to neither.
        """
        found: list[Path] = []
        for path in (*listed(self._root, "*.refused.json"), *listed(self._figures, "*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                content = json.loads(path.read_bytes())
                digest = content["recipe"]["snapshot"] if "recipe" in content else content["snapshot"]
                if (digest in snapshots) != others:
                    found.append(path)
        return sorted(found)

    def sweep(self) -> None:
        """Remove what killed processes left: artifacts in the making, locks and holds."""
        sweep(self._root)
        for path in (*listed(self._root, "*.lock"), *listed(self._root, "*.hold")):
            remove_stale(path)

    def unfinished(self) -> list[Path]:
        """Return the artifacts in the making that nobody makes any more."""
        return [
            path
            for path in listed(self._root, ".*.tmp")
            if not is_held(self._root / f"{path.name.split('.')[1]}.lock")
        ]

    def remove_empty_directories(self) -> None:
        """Leave no directory in which nothing is."""
        for directory in (self._root, self._figures):
            with contextlib.suppress(OSError):
                directory.rmdir()


def _read(path: Path) -> StockedArtifact | None:
    try:
        content = json.loads(path.read_bytes())
        description = dict(content["description"])
        artifact = StockedArtifact(
            key=path.parent.name,
            snapshot=str(content["recipe"]["snapshot"]),
            weights=str(content["recipe"]["weights"]),
            size=sum(int(entry["size"]) for entry in content["files"]),
            last_used=path.parent.stat().st_mtime,
            description=description,
        )
        _ = artifact.fidelity
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The artifact %s is damaged: %s", path.parent, error)
        return None
    return artifact
