"""Checks of directories: free space, and permission to write."""

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

_LOW_BYTES, _FULL_BYTES = 5_000_000_000, 500_000_000


def check_directories(settings: Settings) -> Iterator[CheckResult]:
    """Check the directories that the service writes to: caches and logs."""
    from emb_model_provider.hubs.caches import cache_root

    hubs, logs = settings.hubs, settings.logs
    yield _check("cache", hubs.cache_dir, "EMB_PROVIDER_CACHE_DIR")
    yield _check("cache of huggingface", cache_root("huggingface", hubs.hf_cache_dir), "EMB_PROVIDER_HF_CACHE_DIR")
    yield _check(
        "cache of modelscope", cache_root("modelscope", hubs.modelscope_cache_dir), "EMB_PROVIDER_MODELSCOPE_CACHE_DIR"
    )
    if logs.log_to_file:
        yield _check("log", logs.log_dir, "EMB_PROVIDER_LOG_DIR", small=True)


def _check(name: str, directory: Path, setting: str, *, small: bool = False) -> CheckResult:
    from emb_model_provider.snapshots.files import require_writable

    directory = directory.expanduser().absolute()
    missing = [path for path in (directory, *directory.parents) if not _exists(path)]
    try:
        require_writable(directory, setting)
    except HubError as error:
        return CheckResult(name, "fail", f"{directory} is not writable", error.message)
    finally:
        for created in missing:  # the check leaves no directories behind
            with contextlib.suppress(OSError):
                created.rmdir()
    existing = next(path for path in (directory, *directory.parents) if _exists(path))
    free = shutil.disk_usage(existing).free
    found = f"{directory}, {format_size(free)} free"
    if free < _FULL_BYTES:
        advice = (
            f"Free some space, or set {setting} to a directory on a larger disk. To see what can be removed: "
            "emb-provider list"
        )
        return CheckResult(name, "warn" if small else "fail", found, advice)
    if free < _LOW_BYTES and not small:
        advice = f"A large model may not fit. Free some space (emb-provider prune), or set {setting}."
        return CheckResult(name, "warn", found, advice)
    return CheckResult(name, "ok", found)


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - pathlib raises if a parent is not accessible
