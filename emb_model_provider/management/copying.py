"""A snapshot's files, copied to where somebody wants them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from emb_model_provider.errors import HubError
from emb_model_provider.hubs.snapshot import hash_file

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.hubs.snapshot import Snapshot


def copy_snapshot(snapshot: Snapshot, directory: Path) -> Path:
    """Copy a held snapshot's files into a directory, checking each against its hash; return the directory.

    Files that are there already with the right bytes stay as they are; others of the same name are replaced.

    Raises: HubError where the directory cannot be written, or the snapshot has other bytes than it had.
    """
    try:
        for file in snapshot.files:
            place = directory / file.path
            if _has(place, file.sha256, file.size):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_name(f".{place.name}.incomplete")
            try:
                shutil.copyfile(snapshot.path / file.path, partial)
                if not _has(partial, file.sha256, file.size):
                    raise HubError(
                        f"{file.path} of {snapshot.repository} in {snapshot.path} has other bytes than it had. "
                        f"Fetch it again: `emb-provider pull --force {snapshot.repository}`."
                    )
                partial.replace(place)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise HubError(
            f"{snapshot.repository} could not be copied to {directory}: {error}. Make room or make it writable, or "
            "choose another directory."
        ) from error
    return directory


def _has(path: Path, sha256: str, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size and hash_file(path).sha256 == sha256
