"""Markers of what was begun and did not end: how a fetch or a removal that was killed is noticed, and put right.

One JSON file per question, `{hub}/{stem}.pending` beside its manifest. It is written before the first change, touched
while the work goes on, and removed at the end. It names what lay in the client's directories before: that belongs to
others, and so does what changed after the marker was touched last.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emb_model_provider.errors import FetchCancelledError
from emb_model_provider.hubs.caches import Place, places
from emb_model_provider.snapshots.files import everything_below, listed, write_atomically
from emb_model_provider.snapshots.locks import is_held, remove_stale
from emb_model_provider.snapshots.manifest import Question, manifest_files

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

log = logging.getLogger(__name__)

_VERSION = 1
_TOUCH_EVERY_S = 2.0
_SLACK_S = 15.0
"""How long after the last touch a change can still be that process's own."""
_PARTIAL = (".incomplete", ".parallel_tmp")
_TAGS = {"CACHEDIR.TAG"}
"""What the Hugging Face client writes into its cache beside the repositories."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A fetch or a removal that goes on, or did not come to its end."""

    question: Question
    doing: Literal["fetch", "remove"]
    places: tuple[Place, ...]
    before: frozenset[str]
    """What lay in the places before, directories with a slash at their end: absolute paths."""
    path: Path | None
    """Of a removal: the snapshot's directory."""
    touched: float
    """Unix time, seconds."""


def marker_path(question: Question, manifest_dir: Path) -> Path:
    return manifest_dir / question.hub / f"{question.stem}.pending"


def load_all(manifest_dir: Path) -> list[Pending]:
    """All markers that are there and can be read."""
    found = (load(path) for directory in listed(manifest_dir) for path in listed(directory, "*.pending"))
    return [pending for pending in found if pending is not None]


def load(path: Path) -> Pending | None:
    """Read a marker; None where there is none, or none that makes sense."""
    try:
        return _parse(path, json.loads(path.read_bytes()), path.stat().st_mtime)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("The marker %s cannot be read and is left alone: %s", path, error)
        return None


@contextlib.contextmanager
def fetching(
    question: Question, where: tuple[Place, ...], manifest_dir: Path
) -> Iterator[Callable[[], None]]:
    """Mark a fetch while it goes on; gives what to call whenever bytes arrive. Hold the repository's lock.

    One that is cancelled leaves nothing of what it brought. One that fails leaves what can be resumed, and the marker
    where there is such.

    Raises: OSError where the marker cannot be written.
    """
    path = marker_path(question, manifest_dir)
    earlier = load(path)
    before = frozenset(_contents(where))
    if earlier is not None and earlier.doing == "fetch":
        # What a killed fetch left is still ours.
        ours = {str(file) for file in (*leftovers(earlier, _kept(manifest_dir)), *_locks_of(earlier))}
        before = frozenset(
            name for name in before if name in earlier.before or not (name in ours or name.endswith("/"))
        )
    elif earlier is not None and earlier.path is not None and not changed_since(earlier, earlier.path):
        before = frozenset(name for name in before if not _is_below(Path(name), earlier.path))
    _write(path, question, "fetch", where, before, None)
    touched = time.monotonic()

    def touch() -> None:
        nonlocal touched
        if time.monotonic() - touched >= _TOUCH_EVERY_S:
            touched = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(path)

    def now() -> Pending:
        return Pending(question, "fetch", where, before, None, time.time())

    try:
        yield touch
    except FetchCancelledError:
        for lock in _locks_of(now(), own=True):
            # Held, if at all, by a thread of ours that waits for bytes nobody wants.
            lock.unlink(missing_ok=True)
        clear(now(), manifest_dir)
        raise
    except Exception:
        _remove_locks(now())
        if not leftovers(now(), _kept(manifest_dir)):
            clear(now(), manifest_dir)
        raise
    else:
        _remove_locks(now())
        path.unlink(missing_ok=True)


def removing(question: Question, where: tuple[Place, ...], snapshot: Path, manifest_dir: Path) -> Path:
    """Mark a removal, before anything is removed; return the marker, to remove when all is gone. Raises: OSError."""
    path = marker_path(question, manifest_dir)
    _write(path, question, "remove", where, frozenset(), snapshot)
    return path


def clear(pending: Pending, manifest_dir: Path) -> int:
    """Remove what a fetch left, its marker at the end; return how many bytes that were. Hold the repository's lock."""
    freed = 0
    for file in leftovers(pending, _kept(manifest_dir)):
        with contextlib.suppress(OSError):
            size = file.lstat().st_size
            file.unlink()
            freed += size
    _remove_locks(pending)
    for place in pending.places:
        _remove_empty(place, pending.before)
    marker_path(pending.question, manifest_dir).unlink(missing_ok=True)
    return freed


def size_left(pending: Pending, manifest_dir: Path) -> int:
    """Return how many bytes `clear` would remove of a fetch that nobody goes on with, 0 of any other."""
    if pending.doing != "fetch" or is_held(pending.question.lock_path(manifest_dir)):
        return 0
    freed = 0
    for file in leftovers(pending, _kept(manifest_dir)):
        with contextlib.suppress(OSError):
            freed += file.lstat().st_size
    return freed


def leftovers(pending: Pending, kept: Collection[Path]) -> list[Path]:
    """The files that a fetch left, locks not among them.

    Not what was there before, nor what others did afterwards: what changed later, the snapshots that it changed in,
    the snapshots of manifests (`kept`), and what any of these link to.
    """
    limit = pending.touched + _SLACK_S
    new = [
        (place, Path(name))
        for place in pending.places
        if not place.locks
        for name in _contents([place])
        if name not in pending.before and not name.endswith("/")
    ]
    theirs = {*kept}
    for place, file in new:
        if _changed(file) > limit:
            theirs.add(_snapshot_of(place, file))
    left = [
        file
        for _, file in new
        if (file.suffix in _PARTIAL and _changed(file) <= limit)
        or not any(_is_below(file, path) for path in theirs)
    ]
    linked = {
        os.path.realpath(file)
        for path in theirs
        for file in (path, *everything_below(path))
        if file.is_symlink()
    }
    return [file for file in left if file.is_symlink() or os.path.realpath(file) not in linked]


def changed_since(pending: Pending, directory: Path) -> bool:
    """Whether somebody changed a directory's files after the process that left the marker was gone."""
    limit = pending.touched + _SLACK_S
    return any(
        _changed(path) > limit for path in everything_below(directory) if path.is_symlink() or path.is_file()
    )


def remove_empty_above(path: Path, root: Path) -> None:
    """Remove a directory and those above it, up to a cache, which stays, as long as they are empty."""
    while path != root and _is_below(path, root):
        try:
            path.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return
        path = path.parent
    with contextlib.suppress(OSError):
        if {entry.name for entry in root.iterdir()} <= _TAGS:
            for name in _TAGS:
                (root / name).unlink(missing_ok=True)


def _write(
    path: Path, question: Question, doing: str, where: Sequence[Place], before: frozenset[str], snapshot: Path | None
) -> None:  # fmt: skip
    content: dict[str, Any] = {
        "version": _VERSION,
        **question.as_json(),
        "doing": doing,
        "places": [[str(place.root), str(place.path)] for place in where],
        "before": sorted(before),
        "path": str(snapshot) if snapshot else None,
    }
    write_atomically(path, json.dumps(content, indent=1).encode())


def _parse(path: Path, content: Any, touched: float) -> Pending:
    if content["version"] != _VERSION:
        raise ValueError(f"version {content['version']}")
    question = Question.read(content)
    if path != marker_path(question, path.parents[1]):
        raise ValueError("it was written for something else")
    named: list[Place] = []
    for root, where in content["places"]:
        known = {place.path: place for place in places(question.hub, question.repository, Path(root))}
        if Path(where) not in known:
            raise ValueError("it names a place that no client uses")
        named.append(known[Path(where)])
    return Pending(
        question=question,
        doing="remove" if content["doing"] == "remove" else "fetch",
        places=tuple(named),
        before=frozenset(map(str, content["before"])),
        path=Path(content["path"]) if content["path"] else None,
        touched=touched,
    )


def _contents(where: Sequence[Place]) -> Iterator[str]:
    """All that lies in the places, directories with a slash at their end. Follows no link."""
    for place in where:
        for above in (place.path, *place.path.parents):
            if _is_below(above, place.root) and above != place.root and above.is_dir():
                yield f"{above}/"
        for parent, directories, files in os.walk(place.path):
            links = [name for name in directories if (Path(parent) / name).is_symlink()]
            yield from (f"{parent}/{name}/" for name in directories if name not in links)
            yield from (f"{parent}/{name}" for name in (*files, *links))


def _locks_of(pending: Pending, *, own: bool = False) -> list[Path]:
    """The locks that were not there before; `own`: where only those of this repository are."""
    names = _contents([place for place in pending.places if place.locks and not (own and place.shared)])
    return [Path(name) for name in names if name not in pending.before and not name.endswith("/")]


def _remove_locks(pending: Pending) -> None:
    """Remove the locks that the client left, but those that somebody holds or that were there before."""
    for path in _locks_of(pending):
        remove_stale(path)
    for place in pending.places:
        if place.locks:
            _remove_empty(place, pending.before)


def _remove_empty(place: Place, before: Collection[str]) -> None:
    """Remove the directories that are empty and were not there before."""
    for name in sorted(_contents([place]), key=len, reverse=True):
        if name.endswith("/") and name not in before:
            with contextlib.suppress(OSError):
                Path(name).rmdir()
    remove_empty_above(place.root, place.root)


def _kept(manifest_dir: Path) -> set[Path]:
    return {found.snapshot.path for _, found in manifest_files(manifest_dir)}


def _snapshot_of(place: Place, file: Path) -> Path:
    """The directory that a file of a snapshot belongs to; a file that is of none, alone."""
    parts = file.relative_to(place.path).parts
    if parts[0] == "snapshots" and len(parts) > 1:
        return place.path / "snapshots" / parts[1]
    return file if parts[0] in {"blobs", "refs", "trees", ".no_exist"} else place.path


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_ctime
    except OSError:
        return 0.0


def _is_below(path: Path, directory: Path) -> bool:
    return path.is_absolute() and ".." not in path.parts and path.is_relative_to(directory)
