"""A ModelScope branch that moved on: its newer files take the place of the older ones all at once, or not at all.

ModelScope's client keeps a branch in one directory, and replaces its files one after the other while it fetches. Who
loads the model meanwhile would read some of each state, and a fetch that fails would leave neither.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emb_model_provider.errors import ModelInUseError
from emb_model_provider.hubs.layout import modelscope_older, places
from emb_model_provider.hubs.manifest import manifest_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from emb_model_provider.hubs.base import HubConfig


@dataclass(frozen=True, slots=True)
class Moved:
    """A snapshot that is here, of which the hub lists a newer state."""

    repository: str
    directory: Path
    """Of the snapshot."""
    beside: Path
    """Where to fetch what changed, first."""
    changed: frozenset[str]
    """Files that are new or have other bytes now."""
    manifests: Sequence[Path]
    """Those that speak for what is to be replaced."""
    is_held: Callable[[Path], bool]

    def require_free(self) -> None:
        """Raises: ModelInUseError."""
        if self.is_held(self.directory):
            raise ModelInUseError(
                f"{self.repository} is in use, and ModelScope has a newer state of it: nothing was replaced. Unload "
                f"it first (`emb-provider unload {self.repository}`), or end the process that uses it; then fetch it "
                "again."
            )

    def put_in_place(self) -> None:
        """Replace what changed with what was fetched beside it. Hold the repository's lock.

        Raises: ModelInUseError where somebody came to use the snapshot meanwhile; OSError.
        """
        manifests = {path: path.read_bytes() for path in self.manifests if path.exists()}
        for path in manifests:
            path.unlink()
        try:
            # In this order: who holds the snapshot before this sees is refused; who comes later finds no manifest.
            self.require_free()
        except ModelInUseError:
            for path, content in manifests.items():
                path.write_bytes(content)
            raise
        for name in sorted(self.changed):
            place = self.directory / name
            place.parent.mkdir(parents=True, exist_ok=True)
            (self.beside / name).replace(place)
        shutil.rmtree(self.beside, ignore_errors=True)


def find_moved(
    config: HubConfig, repository: str, revision: str, listed: Mapping[str, str | None], root: Path
) -> Moved | None:
    """Return the snapshot that fetching `listed` (path to sha256, where the hub says it) would change, if there is one.

    What only was damaged here has the same hash as before at the hub: it is not meant.
    """
    newest = places("modelscope", repository, root)[0].path
    of_branch = {newest / "snapshots" / revision, *modelscope_older(root, repository)}
    here = [
        (question, found.snapshot)
        for question, found in manifest_files(config.manifest_dir)
        if question.hub == "modelscope"
        and question.repository == repository
        and found.snapshot.path in of_branch
        and found.snapshot.revision == revision
    ]
    known = {file.path: file.sha256 for _, snapshot in here for file in snapshot.files}
    other = {path for path, sha256 in listed.items() if sha256 and known.get(path, sha256) != sha256.lower()}
    if not other:
        return None
    return Moved(
        repository,
        here[0][1].path,
        newest / ".newer",
        frozenset(other | (listed.keys() - known.keys())),
        [
            question.manifest_path(config.manifest_dir)
            for question, snapshot in here
            if any(file.path in other for file in snapshot.files)
        ],
        config.is_held,
    )
