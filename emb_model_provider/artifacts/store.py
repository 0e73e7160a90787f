"""Where artifacts are kept: found again, made once, thrown away when there are too many.

Under `<cache directory>/artifacts/`:

    <key>/                 an artifact, whole: it got this name only when all of its files were on disk
    <key>.lock             held (exclusively) by whoever makes or removes that artifact
    <key>.hold             held (shared) by every process that serves from it, so that it is not thrown away
    <key>.refused.json     why this recipe gives no artifact, so that the next start does not try for minutes
    .<key>.<random>.tmp/   an artifact in the making; where nobody holds its lock, what a killed process left

A lock or a hold ends with its process, however that ends, and its file goes with it (hubs/locks.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emb_model_provider.artifacts.manifest import FILES, MANIFEST, read_artifact, read_fidelity
from emb_model_provider.snapshots.files import (
    CACHE_SETTING,
    listed,
    require_writable,
    storage_error,
    write_atomically,
)
from emb_model_provider.snapshots.locks import Held, claim, is_held, remove_stale, share
from emb_model_provider.snapshots.snapshot import hash_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from emb_model_provider.artifacts.manifest import Artifact
    from emb_model_provider.artifacts.recipe import Recipe
    from emb_model_provider.backends.base import Fidelity


logger = logging.getLogger(__name__)


Hold = Held
"""Keeps an artifact from being thrown away until it is released, or forgotten, or the process ends."""


class ArtifactStore:
    """The artifacts of one cache directory, which any number of processes may share."""

    def __init__(self, cache_dir: Path, *, max_bytes: int) -> None:
        self._root = cache_dir / "artifacts"
        self._max_bytes = max_bytes

    def find(self, recipe: Recipe) -> tuple[Artifact, Hold] | None:
        """Return the artifact of a recipe, held, if it is there and whole. Reads only; needs no write access."""
        return self._take(self._root / recipe.key)

    def find_compatible(self, recipe: Recipe) -> tuple[Artifact, Hold] | None:
        """Return an artifact that serves a recipe although it was made elsewhere (see `Recipe.can_serve`)."""
        try:
            directories = sorted(path for path in self._root.iterdir() if path.is_dir())
        except OSError:
            return None
        for directory in directories:
            if directory.name.startswith("."):
                continue
            try:
                made_from = json.loads((directory / MANIFEST).read_bytes())["recipe"]
                suitable = recipe.can_serve(made_from)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
            if suitable and (found := self._take(directory)) is not None:
                return found
        return None

    def refusal(self, recipe: Recipe) -> str | None:
        """Return why this recipe is known to give no artifact, or None."""
        try:
            content = json.loads(self._refusal_path(recipe).read_bytes())
            return str(content["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def refuse(self, recipe: Recipe, reason: str) -> None:
        """Remember that a recipe gives no artifact; whatever changes the recipe forgets it."""
        content = {"reason": reason, "recipe": recipe.as_json()}
        with contextlib.suppress(OSError):
            write_atomically(self._refusal_path(recipe), json.dumps(content, indent=1).encode())

    def require_writable(self) -> None:
        """Raises: HubError, most often CacheNotWritableError, which names the setting."""
        require_writable(self._root, CACHE_SETTING)

    @contextlib.contextmanager
    def making(self, recipe: Recipe, *, stopped: Callable[[], bool]) -> Iterator[Path]:
        """Hold a recipe's lock and give an empty directory to make it in, which is gone afterwards.

        Waits for another process that makes the same artifact, which may have finished it by then: look again.

        Raises: HubError where the cache cannot be written, InterruptedError when `stopped` while waiting.
        """
        self.require_writable()
        try:
            lock = self._wait_for(self._root / f"{recipe.key}.lock", stopped)
        except OSError as error:
            if isinstance(error, InterruptedError):
                raise
            raise storage_error(error, self._root, CACHE_SETTING) or error from error
        with lock:
            try:
                sweep(self._root, recipe.key)
                directory = tempfile.mkdtemp(dir=self._root, prefix=f".{recipe.key}.", suffix=".tmp")
            except OSError as error:
                raise storage_error(error, self._root, CACHE_SETTING) or error from error
            try:
                yield self._root / directory
            finally:
                shutil.rmtree(directory, ignore_errors=True)

    def keep(self, recipe: Recipe, made: Path) -> tuple[Artifact, Hold]:
        """Give a finished directory its name, inside `making`; then make room. Returns the artifact, held.

        Raises: OSError.
        """
        place = self._root / recipe.key
        if place.exists():  # damaged, or it would have been found
            remove_artifact(place)
        # mkdtemp makes directories for the owner only; a cache may be shared, as the files in it are.
        made.chmod(0o755)
        made.rename(place)
        self._refusal_path(recipe).unlink(missing_ok=True)
        taken = self._take(place)
        if taken is None:
            raise OSError(f"the artifact in {place} is not whole although it was just written")
        self._make_room()
        return taken

    # --- keeping order ----------------------------------------------------------------------------------

    def _take(self, directory: Path) -> tuple[Artifact, Hold] | None:
        if not directory.is_dir():
            return None
        hold = share(self._root / f"{directory.name}.hold")  # waits for a removal that is under way
        artifact = read_artifact(directory)
        if artifact is None:
            hold.release()
            return None
        with contextlib.suppress(OSError):
            os.utime(directory)  # when it was last used
        return artifact, hold

    def _make_room(self) -> None:
        """Remove the artifacts that were used longest ago while all together are larger than allowed."""
        found = []
        for path in listed(self._root):
            if path.is_dir() and not path.name.startswith("."):
                with contextlib.suppress(OSError):
                    size = sum(file.stat().st_size for file in path.iterdir())
                    found.append((path.stat().st_mtime_ns, size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max_bytes:
                return
            if self._remove_unless_held(path):
                logger.info("Removed the artifact %s (%.0f MB) to make room", path.name[:12], size / 1e6)
                total -= size
        if total > self._max_bytes:
            logger.warning(
                "The artifacts in %s take %.1f GB, which is more than the limit of %.1f GB: all are in use",
                self._root, total / 1e9, self._max_bytes / 1e9,
            )  # fmt: skip

    def _remove_unless_held(self, path: Path) -> bool:
        try:
            held = claim(self._root / f"{path.name}.hold")
        except OSError:
            return False
        if held is None:
            return False
        with held:
            return remove_artifact(path)

    def _wait_for(self, path: Path, stopped: Callable[[], bool]) -> Held:
        """Hold the lock of a recipe. Raises: InterruptedError when stopped, other OSErrors."""
        waiting_since: float | None = None

        def tell() -> None:
            nonlocal waiting_since
            waiting_since = time.monotonic()
            logger.info("Another process is compiling this model: waiting for it")

        lock = claim(path, wait_s=None, on_wait=tell, stopped=stopped)
        if lock is None:
            raise InterruptedError("stopped while waiting")
        if waiting_since is not None:
            logger.info("The other process is done, after %.0f s", time.monotonic() - waiting_since)
        return lock

    def _refusal_path(self, recipe: Recipe) -> Path:
        return self._root / f"{recipe.key}.refused.json"


def sweep(root: Path, own_key: str | None = None) -> list[Path]:
    """Remove what killed processes left, and return it: directories in the making whose lock nobody holds.

    `own_key`: of the artifact whose lock the caller holds.
    """
    swept: list[Path] = []
    for path in listed(root, ".*.tmp"):
        key = path.name.split(".")[1]
        if key == own_key:
            shutil.rmtree(path, ignore_errors=True)
            swept.append(path)
            continue
        try:
            held = claim(root / f"{key}.lock")
        except OSError:
            continue
        if held is not None:
            with held:
                shutil.rmtree(path, ignore_errors=True)
                swept.append(path)
    return swept


def remove_artifact(path: Path) -> bool:
    """Remove an artifact in one step, as far as anybody who looks for it can see; return whether it is gone.

    Hold it alone.
    """
    grave = path.with_name(f".{path.name}.removed-{os.getpid()}.tmp")
    try:
        path.rename(grave)
    except OSError:
        return False
    shutil.rmtree(grave, ignore_errors=True)
    return True


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
