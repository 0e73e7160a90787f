"""The artifacts of a cache directory: made once, and removed when they take too much space.

Below `<cache directory>/artifacts/`:

    <key>/                 a complete artifact: it gets this name when all its files are on disk
    <key>.lock             held exclusively while the artifact is made or removed
    <key>.hold             held shared by every process that serves the artifact, so that it is not removed
    <key>.refused.json     why a recipe gives no artifact, so that the next start does not try again
    .<key>.<random>.tmp/   an artifact that is being made; if its lock is free, a killed process left it

Fidelity that was measured for the torch backend is in `<cache directory>/fidelity/`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from typing import TYPE_CHECKING

from emb_model_provider.artifacts.manifest import read_artifact, read_info, verify_artifact
from emb_model_provider.artifacts.recipe import installed_version
from emb_model_provider.formatting import format_size
from emb_model_provider.snapshots.files import (
    CACHE_SETTING,
    list_dir,
    require_writable,
    translate_os_error,
    write_atomically,
)
from emb_model_provider.snapshots.locks import FileLock, is_locked, lock_exclusive, lock_shared, try_lock_exclusive

if TYPE_CHECKING:
    import builtins
    from collections.abc import Iterator
    from pathlib import Path

    from emb_model_provider.artifacts.manifest import Artifact, ArtifactInfo
    from emb_model_provider.artifacts.recipe import Recipe
    from emb_model_provider.progress import CancelToken

logger = logging.getLogger(__name__)

_PACKAGE = "emb-model-provider"


class ArtifactStore:
    """The artifacts of one cache directory. Any number of processes can share it."""

    def __init__(self, cache_dir: Path, *, max_bytes: int) -> None:
        self._root = cache_dir / "artifacts"
        self._fidelity = cache_dir / "fidelity"
        self._max_bytes = max_bytes

    def find(self, recipe: Recipe) -> tuple[Artifact, FileLock] | None:
        """Return the artifact of a recipe, and the lock that keeps it on disk. Needs no write access."""
        return self._hold(self._root / recipe.key)

    def has(self, recipe: Recipe) -> bool:
        """Return whether there is an artifact of a recipe. Its files are not looked at."""
        return (self._root / recipe.key).is_dir()

    def find_compatible(self, recipe: Recipe) -> tuple[Artifact, FileLock] | None:
        """Return an artifact of another machine that can serve a recipe (see `Recipe.can_serve`)."""
        for info in self.list():
            if recipe.can_serve(info.recipe) and (found := self._hold(info.directory)) is not None:
                return found
        return None

    def refusal(self, recipe: Recipe, *, timeout_s: float = 0) -> str | None:
        """Return why a recipe is known to give no artifact, or None.

        A refusal of another version of this package does not count, because that version may compile more models. Nor
        does one because of a timeout that was shorter than `timeout_s` (seconds, 0 for none).
        """
        try:
            content = json.loads(self._refusal_path(recipe).read_bytes())
            reason, package, limit = str(content["reason"]), content.get("package"), content.get("timeout_s")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if package != installed_version(_PACKAGE):
            return None
        if isinstance(limit, (int, float)) and (timeout_s == 0 or timeout_s > limit):
            return None
        return reason

    def require_writable(self) -> None:
        """Raise a HubError if artifacts cannot be written; most often a CacheNotWritableError."""
        require_writable(self._root, CACHE_SETTING)

    @contextlib.contextmanager
    def making(self, recipe: Recipe, cancel: CancelToken, *, wait_s: float) -> Iterator[Path]:
        """Lock a recipe and provide an empty directory to make its artifact in; it is removed afterwards.

        Waits for a process that makes the same artifact, which may have finished it then: look for it again.

        Raises:
            HubError: The cache cannot be written.
            OperationCancelledError: `cancel` was cancelled while waiting.
            TimeoutError: Another process still makes the artifact after `wait_s` seconds.
        """
        self.require_writable()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._wait_for(self._root / f"{recipe.key}.lock", cancel, wait_s))
                self.remove_unfinished(recipe.key)
                directory = tempfile.mkdtemp(dir=self._root, prefix=f".{recipe.key}.", suffix=".tmp")
            except OSError as error:
                raise translate_os_error(error, self._root, CACHE_SETTING) or error from error
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            yield self._root / directory

    def add(self, recipe: Recipe, made: Path) -> tuple[Artifact, FileLock]:
        """Add a finished artifact, within `making`, then remove old artifacts if there are too many."""
        directory = self._root / recipe.key
        if directory.exists():  # damaged, else it would have been found
            self.remove(recipe.key)
        # mkdtemp creates directories for the owner only, but a cache can be shared.
        made.chmod(0o755)
        made.rename(directory)
        self._refusal_path(recipe).unlink(missing_ok=True)
        held = self._hold(directory)
        if held is None:
            raise OSError(f"the artifact in {directory} is damaged although it was just written")
        self._trim()
        return held

    def refuse(self, recipe: Recipe, reason: str, *, timeout_s: float | None = None) -> None:
        """Record that a recipe gives no artifact, or none within `timeout_s` seconds.

        Any change of the recipe makes the record void; see also `refusal`.
        """
        content = {
            "reason": reason,
            "package": installed_version(_PACKAGE),
            "timeout_s": timeout_s,
            "recipe": recipe.as_json(),
        }
        with contextlib.suppress(OSError):
            write_atomically(self._refusal_path(recipe), json.dumps(content, indent=1).encode())

    def list(self) -> list[ArtifactInfo]:
        """Return the artifacts that have a valid manifest, by key."""
        directories = (path for path in list_dir(self._root) if path.name[0] != "." and path.is_dir())
        return [info for path in directories if (info := read_info(path)) is not None]

    def is_held(self, key: str) -> bool:
        """Return whether a process serves an artifact or makes it."""
        return is_locked(self._root / f"{key}.hold") or is_locked(self._root / f"{key}.lock")

    def try_lock(self, key: str, *, wait_s: float = 0.0) -> FileLock | None:
        """Lock an artifact in order to remove it; None if it is still in use after `wait_s` seconds."""
        return try_lock_exclusive(self._root / f"{key}.hold", wait_s=wait_s)

    def remove(self, key: str) -> bool:
        """Remove a locked artifact, in one step for all readers; return whether it is removed."""
        directory = self._root / key
        doomed = directory.with_name(f".{key}.removed-{os.getpid()}.tmp")
        try:
            directory.rename(doomed)
        except OSError:
            return False
        shutil.rmtree(doomed, ignore_errors=True)
        return True

    def verify(self, key: str) -> bool:
        """Hash the files of an artifact, and return whether they match its manifest. A damaged one is not served."""
        return verify_artifact(self._root / key)

    def records_of(self, snapshots: set[str], *, others: bool = False) -> builtins.list[Path]:
        """Return the files of refusals and of measured fidelity of these snapshots (digests), or of all others."""
        found: builtins.list[Path] = []
        for path in (*list_dir(self._root, "*.refused.json"), *list_dir(self._fidelity, "*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                content = json.loads(path.read_bytes())
                digest = content["recipe"]["snapshot"] if "recipe" in content else content["snapshot"]
                if (digest in snapshots) != others:
                    found.append(path)
        return sorted(found)

    def unfinished(self) -> builtins.list[Path]:
        """Return the directories of artifacts that no process makes any longer."""
        return [path for path in list_dir(self._root, ".*.tmp") if not is_locked(self._root / f"{_key_of(path)}.lock")]

    def remove_unfinished(self, own_key: str | None = None) -> None:
        """Remove the directories that `unfinished` returns, and those of `own_key`, whose lock the caller holds."""
        for path in list_dir(self._root, ".*.tmp"):
            key = _key_of(path)
            with contextlib.suppress(OSError):
                lock_path = self._root / f"{key}.lock"
                lock = contextlib.nullcontext() if key == own_key else try_lock_exclusive(lock_path)
                if lock is not None:
                    with lock:
                        shutil.rmtree(path, ignore_errors=True)

    def _hold(self, directory: Path) -> tuple[Artifact, FileLock] | None:
        if not directory.is_dir():
            return None
        lock = lock_shared(self._root / f"{directory.name}.hold")  # waits for a removal
        artifact = read_artifact(directory)
        if artifact is None:
            lock.release()
            return None
        with contextlib.suppress(OSError):
            os.utime(directory)  # the time of the last use
        return artifact, lock

    def _trim(self) -> None:
        """Remove the least recently used artifacts until all of them take no more than allowed."""
        found = sorted(self.list(), key=lambda info: info.last_used)
        total = sum(info.size for info in found)
        for info in found:
            if total <= self._max_bytes:
                return
            with contextlib.suppress(OSError):
                if (lock := self.try_lock(info.key)) is None:
                    continue
                with lock:
                    if self.remove(info.key):
                        size = format_size(info.size)
                        logger.info("Removed the artifact %s (%s) to free space", info.key[:12], size)
                        total -= info.size
        if total > self._max_bytes:
            logger.warning(
                "The artifacts in %s take %s, more than the limit of %s: all are in use",
                self._root, format_size(total), format_size(self._max_bytes),
            )  # fmt: skip

    def _wait_for(self, path: Path, cancel: CancelToken, wait_s: float) -> FileLock:
        waiting_since: float | None = None

        def log_waiting() -> None:
            nonlocal waiting_since
            waiting_since = time.monotonic()
            logger.info("Another process is compiling this model: waiting for it")

        lock = lock_exclusive(path, on_wait=log_waiting, cancel=cancel, timeout_s=wait_s)
        if waiting_since is not None:
            logger.info("The other process has finished after %.0f s", time.monotonic() - waiting_since)
        return lock

    def _refusal_path(self, recipe: Recipe) -> Path:
        return self._root / f"{recipe.key}.refused.json"


def _key_of(unfinished: Path) -> str:
    return unfinished.name.split(".")[1]
