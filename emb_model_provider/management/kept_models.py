"""The models that `load --keep` has added, which are served again after a restart.

They are in one file of the cache directory, which all services with this directory share. It is replaced in one step, so
that a process that is killed leaves the old content or the new. What is wrong in it is reported and ignored.
"""

from __future__ import annotations

import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from emb_model_provider.errors import CacheNotWritableError
from emb_model_provider.model_spec import Precision, Source
from emb_model_provider.snapshots.files import CACHE_SETTING, require_writable, translate_os_error, write_atomically
from emb_model_provider.snapshots.locks import lock_exclusive

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

logger = logging.getLogger(__name__)

_VERSION = 1


class KeptModel(BaseModel):
    """A model to serve."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    alias: str
    model_name: str
    source: Source
    revision: str | None = None
    precision: Precision = "auto"


class KeptModels:
    """The file of kept models. Thread-safe, and any number of processes can share it."""

    def __init__(self, cache_dir: Path) -> None:
        self.path = cache_dir / "kept-models.json"
        self.aliases: frozenset[str] = frozenset()
        """Those that this object has last read or written."""

    def read(self) -> list[KeptModel]:
        """Return the kept models. Logs a warning about each wrong entry, or about a file that cannot be read."""
        models = self._read()[0]
        self.aliases = frozenset(model.alias for model in models)
        return models

    def add(self, model: KeptModel) -> None:
        """Keep a model in place of another one with its alias.

        Raises:
            HubError: The file cannot be written; most often a CacheNotWritableError.
        """
        self._replace(model.alias, [model])

    def remove(self, alias: str) -> bool:
        """Return whether a model with this alias was kept, and keep it no longer. Raises like `add`."""
        if not any(model.alias == alias for model in self.read()):
            return False
        self._replace(alias, [])
        return True

    def _replace(self, alias: str, new: Iterable[KeptModel]) -> None:
        require_writable(self.path.parent, CACHE_SETTING)
        try:
            with lock_exclusive(self.path.with_suffix(".lock")):
                found, is_valid = self._read()
                if not is_valid:  # what the user may want to repair is not lost
                    self.path.replace(self.path.with_suffix(".invalid"))
                models = [*(model for model in found if model.alias != alias), *new]
                if models:
                    content = {"version": _VERSION, "models": [model.model_dump() for model in models]}
                    write_atomically(self.path, json.dumps(content, indent=1, ensure_ascii=False).encode())
                else:
                    self.path.unlink(missing_ok=True)
                self.aliases = frozenset(model.alias for model in models)
        except OSError as error:
            raise translate_os_error(error, self.path, CACHE_SETTING) or CacheNotWritableError(
                f"{self.path} cannot be written: {error}. Set {CACHE_SETTING} to a writable directory."
            ) from error

    def _read(self) -> tuple[list[KeptModel], bool]:
        """Return the valid entries, and whether all are valid."""
        models: list[KeptModel] = []
        try:
            entries = _entries(json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            return [], True
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._warn(f"it cannot be read ({type(error).__name__}: {error})")
            return [], False
        is_valid = True
        for entry in entries:
            with contextlib.suppress(ValidationError):
                models.append(KeptModel.model_validate(entry))
                continue
            is_valid = False
            self._warn(f"an entry is wrong: {json.dumps(entry, ensure_ascii=False)[:200]}")
        return models, is_valid

    def _warn(self, problem: str) -> None:
        logger.warning(
            "%s: %s. The models in it that are wrong are not served. Repair or remove the file; "
            "`emb-provider load ID --keep` adds a model again.",
            self.path, problem,
        )  # fmt: skip


def _entries(content: dict[str, Any]) -> list[Any]:
    if content["version"] != _VERSION:
        raise ValueError(f"it has the version {content['version']}")
    return list(content["models"])
