"""File operations of the caches: checks against recorded hashes, atomic writes, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from emb_model_provider.errors import CacheNotWritableError, HubError
from emb_model_provider.snapshots.snapshot import hash_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from emb_model_provider.snapshots.snapshot import SnapshotFile

logger = logging.getLogger(__name__)

CACHE_SETTING = "EMB_PROVIDER_CACHE_DIR"
MUST_HASH = -1
"""A time stamp that no file has: a file that is recorded with it is hashed before it is used again."""

_CACHE_TAG = "CACHEDIR.TAG"
"""A file that the Hugging Face client writes into its cache next to the repositories."""
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SECOND = 10**9


@dataclass(frozen=True, slots=True)
class FileProblem:
    """A file that differs from its record, or has none."""

    path: str
    problem: Literal["missing", "size", "bytes", "unreadable", "extra"]


@dataclass(frozen=True, slots=True)
class FileCheck:
    """The result of comparing files with their records."""

    problems: tuple[FileProblem, ...]
    hashed: Mapping[str, int]
    """The files that were hashed, because their time stamp had changed or was not recorded: path to the time stamp
    before they were read, in nanoseconds."""

    @property
    def ok(self) -> bool:
        return not self.problems


def check_files(
    root: Path,
    files: Iterable[SnapshotFile],
    mtimes: Mapping[str, int] | None = None,
    on_bytes: Callable[[int, int], None] = lambda _done, _total: None,
) -> FileCheck:
    """Compare files with their recorded sizes and hashes.

    Args:
        root: The directory of the files.
        files: The records.
        mtimes: Time stamps of the files when they were hashed, in nanoseconds: only a file with another time stamp is
            hashed again, and none is if a file is missing or has another size. None: hash every file.
        on_bytes: Called after each hashed file, with the bytes that were hashed so far and those to hash.
    """
    problems: list[FileProblem] = []
    changed: list[SnapshotFile] = []
    hashed: dict[str, int] = {}
    for file in files:
        with _reporting(root, file, problems):
            stat = (root / file.path).stat()
            if stat.st_size != file.size:
                problems.append(FileProblem(file.path, "size"))
            elif mtimes is None or not is_same_mtime(stat.st_mtime_ns, mtimes[file.path]):
                changed.append(file)
                hashed[file.path] = stat.st_mtime_ns
    if problems and mtimes is not None:
        return FileCheck(tuple(problems), {})
    done, total = 0, sum(file.size for file in changed)
    for file in changed:
        with _reporting(root, file, problems):
            if hash_file(root / file.path).sha256 != file.sha256:
                problems.append(FileProblem(file.path, "bytes"))
        done += file.size
        on_bytes(done, total)
    return FileCheck(tuple(problems), hashed)


def has_sizes(root: Path, files: Iterable[SnapshotFile]) -> bool:
    """Return whether all files exist and have their recorded size. Reads none of them."""
    try:
        return all((root / file.path).stat().st_size == file.size for file in files)
    except OSError:
        return False


def is_same_mtime(now: int, then: int) -> bool:
    """Return whether two time stamps are equal, or equal in seconds if a copy (a container layer) kept only those."""
    return now == then or (now % _SECOND == 0 and now // _SECOND == then // _SECOND)


def translate_os_error(error: OSError, directory: Path | str, setting: str) -> HubError | None:
    """Return the error to raise if `directory`, which `setting` chooses, is not writable or full; None otherwise."""
    if error.errno in _NOT_WRITABLE:
        return CacheNotWritableError(
            f"Cannot write to {directory} ({error.strerror}). Make it writable for this user, or set {setting} "
            "to a writable directory."
        )
    if is_disk_full(error):
        return HubError(
            f"No space left in {directory} ({error.strerror}). Free some space, or set {setting} to a directory on "
            "a larger disk. What was downloaded so far is kept."
        )
    return None


def is_disk_full(error: OSError) -> bool:
    """Return whether the disk is full, a quota is reached, or a file is as large as it may be."""
    return error.errno in _FULL


def require_writable(directory: Path, setting: str) -> None:
    """Create `directory`, which `setting` chooses, and check that it is writable, else raise a HubError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # os.access() answers for the real user id, and does not detect a file system that is mounted read-only.
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise translate_os_error(error, directory, setting) or CacheNotWritableError(
            f"Cannot write to {directory} ({error.strerror}). Set {setting} to a writable directory."
        ) from error


def require_space(path: Path, size: int) -> None:
    """Raise OSError if a file of `size` bytes does not fit on the disk, where the platform can reserve space."""
    if not hasattr(os, "posix_fallocate") or size <= 0:
        return
    try:
        with path.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        if is_disk_full(error):
            error.filename = os.fspath(path)
            raise
    finally:
        path.unlink(missing_ok=True)


def use_temporary_directory(cache_dir: Path) -> None:
    """Let this process and its children keep temporary files in `cache_dir` if there is no other directory for them.

    In a container whose root is read-only, /tmp may be missing, and often only the cache is writable.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        directory = cache_dir / "tmp"
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.tempdir = os.environ["TMPDIR"] = str(directory.absolute())


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Yield a directory for temporary files. It is removed afterwards.

    Raises:
        CacheNotWritableError: There is no writable directory.
    """
    try:
        directory = tempfile.TemporaryDirectory(prefix="emb-provider-", ignore_cleanup_errors=True)
    except OSError as error:
        raise CacheNotWritableError(
            f"No directory for temporary files can be written ({error.strerror}). Mount a writable /tmp, or set TMPDIR or "
            "EMB_PROVIDER_CACHE_DIR to a writable directory."
        ) from error
    with directory as name:
        yield Path(name)


def list_dir(directory: Path, pattern: str = "*") -> list[Path]:
    """Return the entries of a directory that match a pattern, sorted. Unlike `Path.glob` it tolerates its removal."""
    try:
        names = os.listdir(directory)  # noqa: PTH208 - names are matched
    except OSError:
        return []
    return [directory / name for name in sorted(names) if fnmatchcase(name, pattern)]


def walk(directory: Path) -> Iterator[Path]:
    """Yield all files, directories and links below a directory, without following links."""
    for parent, directories, files in os.walk(directory):
        yield from (Path(parent) / name for name in (*directories, *files))


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step, so that readers see either the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(PermissionError):  # FAT and exFAT, on removable media, have no permissions
            temporary.chmod(0o644)  # mkstemp creates files for the owner only, but a cache can be shared
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def size_of(paths: Iterable[Path]) -> int:
    """Return the size of files in bytes, counting hard links and link targets once. Ignores directories."""
    sizes: dict[tuple[int, int], int] = {}
    for file in paths:
        with contextlib.suppress(OSError):
            if file.is_file():
                stat = file.stat()
                sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())


def remove_empty_parents(path: Path, root: Path) -> None:
    """Remove empty directories from `path` up to `root`, a cache, and the tag file in `root` if that is all it contains."""
    while path != root and ".." not in path.parts and path.is_relative_to(root):
        try:
            path.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return
        path = path.parent
    with contextlib.suppress(OSError):
        if [entry.name for entry in root.iterdir()] == [_CACHE_TAG]:
            (root / _CACHE_TAG).unlink()


@contextlib.contextmanager
def _reporting(root: Path, file: SnapshotFile, problems: list[FileProblem]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        problems.append(FileProblem(file.path, "missing"))
    except OSError as error:
        logger.warning("%s cannot be read: %s", root / file.path, error)
        problems.append(FileProblem(file.path, "unreadable"))
