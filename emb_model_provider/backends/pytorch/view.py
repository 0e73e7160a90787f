"""A temporary directory with exactly the files of a repository, for the libraries that load a model from a directory.

They read whatever they find in a directory: weights that are not in the snapshot, an index of shards that do not exist,
an adapter of somebody's experiment. In this directory they find the verified files only.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from emb_model_provider.backends.loading_options import config_options, tokenizer_options, transformer_options
from emb_model_provider.backends.repository import is_processor_file
from emb_model_provider.errors import UnsupportedModelError
from emb_model_provider.snapshots.files import temporary_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from emb_model_provider.backends.repository import Repository

_TRANSFORMER_CONFIG = re.compile(r"(.*/)?sentence_[^/]+_config\.json")
_FILES_WITH_REFERENCES = ("config.json", "tokenizer_config.json", "modules.json")


@contextmanager
def open_view(repository: Repository, digest: str) -> Iterator[Path]:
    """Yield a directory with links to the files of a repository. It is removed afterwards.

    Args:
        repository: The repository. Code of other repositories is put next to its own files.
        digest: The digest of the snapshot. transformers keeps the Python files of a model by the name of its directory.

    Raises:
        UnsupportedModelError: Files of two repositories have the same name, or a file has options that must not be
            passed on to the libraries.
    """
    with temporary_directory() as parent:
        directory = parent / f"model_{digest[:16]}"
        directory.mkdir()
        for name, path in repository.files.items():
            if repository.has_processor and is_processor_file(name):
                continue
            _link(path, directory / name)
        _restrict_options(repository, directory)
        _add_code(repository, directory)
        if "modules.json" not in repository.files and repository.modules:
            (directory / "modules.json").write_text(json.dumps(repository.modules), encoding="utf-8")
        if repository.has_processor:
            _use_tokenizer_as_processor(repository, directory)
        yield directory


def _link(path: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # Windows allows links to administrators only
        link.symlink_to(path.absolute())
        return
    shutil.copyfile(path, link)


def _restrict_options(repository: Repository, directory: Path) -> None:
    """Replace links to configuration files by files with those options only that may be passed on."""
    for name in repository.files:
        if _TRANSFORMER_CONFIG.fullmatch(name):
            options = transformer_options(repository.read(name), f"{name} of {repository.name}")
        elif name.rpartition("/")[2] == "tokenizer_config.json":
            options = tokenizer_options(repository.read(name))
        elif name.rpartition("/")[2] == "config.json":
            options = config_options(repository.read(name))
        else:
            continue
        if options != repository.read(name):
            _replace(directory / name, options)


def _replace(path: Path, value: Any) -> None:
    path.unlink()  # a link
    path.write_text(json.dumps(value), encoding="utf-8")


def _add_code(repository: Repository, directory: Path) -> None:
    """Add the Python files of other repositories, and let the references to them name the added files."""
    if not repository.code:
        return
    owners = dict.fromkeys(repository.files, repository.name)
    for other, files in repository.code.items():
        for name, path in files.items():
            if name in owners and path.read_bytes() != (directory / name).read_bytes():
                raise UnsupportedModelError(
                    f"{repository.name} needs code from {other}, and {owners[name]} has another file of the same name "
                    f"({name}). Copy the code into one directory, change the references in config.json, and serve that."
                )
            if name not in owners:
                owners[name] = other
                _link(path, directory / name)
    for name in _FILES_WITH_REFERENCES:
        if name in repository.files:
            value = json.loads((directory / name).read_text(encoding="utf-8-sig"))
            _replace(directory / name, _without_owner(value, repository))


def _without_owner(value: Any, repository: Repository) -> Any:
    """Return a JSON value in which `owner/name--file.Class` of the added code is `file.Class`."""
    if isinstance(value, dict):
        return {key: _without_owner(item, repository) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_owner(item, repository) for item in value]
    if isinstance(value, str):
        owner, separator, reference = value.partition("--")
        if separator and owner in repository.code:
            return reference
    return value


def _use_tokenizer_as_processor(repository: Repository, directory: Path) -> None:
    """Let AutoProcessor load the tokenizer: other processors need packages for images, which are not read here."""
    tokenizer = repository.read("tokenizer_config.json").get("tokenizer_class") or "PreTrainedTokenizerFast"
    (directory / "processor_config.json").write_text(json.dumps({"processor_class": tokenizer}), encoding="utf-8")
