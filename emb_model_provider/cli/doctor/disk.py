"""Room on the disk, and the right to write there."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from emb_model_provider.cli.doctor import CheckResult
from emb_model_provider.errors import HubError
from emb_model_provider.formatting import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from emb_model_provider.settings import Settings

_SHORT, _FULL = 5_000_000_000, 500_000_000


def check_directories(settings: Settings) -> Iterator[CheckResult]:
    """Look at every directory that is written to: models' files, what is compiled of them, the log."""
    from emb_model_provider.hubs.caches import cache_root

    yield from _check("cache", settings.hubs.cache_dir, "EMB_PROVIDER_CACHE_DIR")
    for hub, own, setting in (
        ("huggingface", settings.hubs.hf_cache_dir, "EMB_PROVIDER_HF_CACHE_DIR"),
        ("modelscope", settings.hubs.modelscope_cache_dir, "EMB_PROVIDER_MODELSCOPE_CACHE_DIR"),
    ):
        yield from _check(f"cache of {hub}", cache_root(hub, own), setting)  # type: ignore[arg-type]  # the two are hubs
    logs = settings.logs
    if logs.log_to_file:
        yield from _check("log", logs.log_dir, "EMB_PROVIDER_LOG_DIR", small=True)


def _check(name: str, directory: Path, setting: str, *, small: bool = False) -> Iterator[CheckResult]:
    from emb_model_provider.snapshots.files import require_writable

    directory = directory.expanduser().absolute()
    missing = _missing(directory)
    try:
        require_writable(directory, setting)
    except HubError as error:
        yield CheckResult(name, "fail", f"{directory} cannot be written", error.message)
        return
    finally:
        # Looking leaves nothing behind.
        for made in missing:
            with contextlib.suppress(OSError):  # it was not made, or somebody else needs it by now
                made.rmdir()
    free = shutil.disk_usage(_existing(directory)).free
    found = f"{directory}, {format_size(free)} free"
    if free < _FULL:
        advice = (
            f"Free some, or set {setting} to a directory on a larger disk. What can go: emb-provider list"
        )
        yield CheckResult(name, "warn" if small else "fail", found, advice)
    elif free < _SHORT and not small:
        advice = f"A large model may not fit: free some (emb-provider prune), or set {setting}."
        yield CheckResult(name, "warn", found, advice)
    else:
        yield CheckResult(name, "ok", found)


def _missing(directory: Path) -> list[Path]:
    """Return what of a path is not there yet, deepest first."""
    return [path for path in (directory, *directory.parents) if not _exists(path)]


def _existing(directory: Path) -> Path:
    return next(path for path in (directory, *directory.parents) if _exists(path))


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - pathlib's raises where a directory above may not be entered
