"""What the disk refuses, said in the words of whoever must do something about it."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.errors import CacheNotWritableError, HubError

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHE_SETTING = "EMB_PROVIDER_CACHE_DIR"

_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT}


def storage_error(error: OSError, directory: Path | str, setting: str) -> HubError | None:
    """The error to raise when `directory`, which `setting` chooses, refuses a write.

    None where the operating system's error is about something else.
    """
    if error.errno in _NOT_WRITABLE:
        return CacheNotWritableError(
            f"Cannot write to {directory} ({error.strerror}). Make it writable for this user, or set {setting} "
            "to a directory that is."
        )
    if error.errno in _FULL:
        return HubError(
            f"No space left in {directory} ({error.strerror}). Free some, or set {setting} to a directory on "
            "a larger disk; what was fetched so far is kept."
        )
    return None


def require_writable(directory: Path, setting: str) -> None:
    """Create `directory` and make sure that it can be written, before anything is fetched.

    Raises: HubError, most often CacheNotWritableError, which names `setting`.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # os.access() answers for the real user id and knows nothing of a file system mounted read-only.
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise storage_error(error, directory, setting) or CacheNotWritableError(
            f"Cannot write to {directory} ({error.strerror}). Set {setting} to a directory that can be written."
        ) from error


def listed(directory: Path, pattern: str = "*") -> list[Path]:
    """What a directory holds that matches a pattern (fnmatch), sorted; nothing where it is not there.

    Unlike `Path.glob` it bears that others remove the directory at the same moment.
    """
    try:
        names = os.listdir(directory)  # noqa: PTH208 (names are what is matched)
    except OSError:
        return []
    return [directory / name for name in sorted(names) if fnmatchcase(name, pattern)]


def everything_below(directory: Path) -> Iterator[Path]:
    """All files, directories and links below a directory; goes into no link. Bears removal, as `listed` does."""
    for parent, directories, files in os.walk(directory):
        yield from (Path(parent) / name for name in (*directories, *files))


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader, or a crash, sees the old content or the new, never a part.

    Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files for the owner only; a cache may be shared, as the other files in it are.
        os.chmod(name, 0o644)  # noqa: PTH101 (a name, not a Path, from mkstemp)
        os.replace(name, path)  # noqa: PTH105 (the same)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)  # noqa: PTH108 (the same)
        raise


def size_of(path: Path) -> int:
    """Bytes of all files below a directory, each counted once; of a link, those of what it points to.

    Goes into no linked directory.
    """
    sizes: dict[tuple[int, int], int] = {}
    for file in everything_below(path):
        with contextlib.suppress(OSError):
            if file.is_file():
                found = file.stat()
                sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())
