"""The other repositories that a model needs: the base model of an adapter, and code in other repositories."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emb_model_provider.errors import HubError, IncompleteRepositoryError, UnsupportedModelError
from emb_model_provider.model_resolver import MODELSCOPE_OWNERS, PATHS, directory_of
from emb_model_provider.model_spec import BUNDLED_MODEL, BUNDLED_REVISION
from emb_model_provider.snapshots.manifest import ALL_FILES, FilePatterns
from emb_model_provider.snapshots.weights import ADAPTER_CONFIG, find_export, is_adapter, split_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.model_spec import ModelSpec, Source
    from emb_model_provider.snapshots.snapshot import Snapshot

CODE_FILES = FilePatterns(include=("*.py", "*.json"))
"""What is downloaded of a repository that a model only takes code from."""

_FILES_WITH_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class Requirement:
    """A repository that a model needs."""

    name: str
    """As the files of the model write it."""
    kind: Literal["base", "code"]
    file: str
    """The file that names it."""
    revision: str | None = None

    @property
    def patterns(self) -> FilePatterns:
        """The files to download."""
        return CODE_FILES if self.kind == "code" else ALL_FILES


def required_repositories(snapshot: Snapshot, name: str, *, with_code: bool) -> list[Requirement]:
    """Return the repositories that a model needs, each once, according to its files.

    Args:
        snapshot: The model.
        name: Its name as it was requested. A reference to code in this repository is one to the model's own files.
        with_code: Include the repositories that the model takes code from.

    Raises:
        IncompleteRepositoryError: It is an adapter whose configuration is invalid.
        UnsupportedModelError: It is an adapter that does not name its base model.
    """
    paths = {file.path for file in snapshot.files}
    found: dict[str, Requirement] = {}
    if is_adapter(paths):
        base = _base_of(snapshot)
        found[base.name] = base
    if with_code:
        for repository, file in _code_references(snapshot, sorted(paths)):
            if repository not in (snapshot.repository, name):
                found.setdefault(repository, Requirement(repository, "code", file))
    return list(found.values())


def spec_of(requirement: Requirement, spec: ModelSpec, snapshot: Snapshot) -> ModelSpec:
    """Return the model to fetch for a requirement of `snapshot`, which `spec` describes.

    It comes from the same hub, with the same endpoint, token and cache. A directory on this machine can have its base
    model in another directory.

    Raises:
        IncompleteRepositoryError: The base model is named by a path that does not exist here.
        UnsupportedModelError: A repository of a hub names a path.
    """
    name = requirement.name
    required = replace(spec, name=name, path=None, revision=requirement.revision)
    if requirement.kind == "code":
        return replace(required, source=_source_of(required, snapshot))
    if snapshot.hub == "local":
        directory = _directory_of(name, snapshot.path)
        if directory is not None:
            return replace(required, source="local", path=directory)
        if name.startswith(PATHS):
            raise IncompleteRepositoryError(
                f"The base model of {snapshot.repository} is {name!r} ({requirement.file}), which does not exist on this "
                f"machine. Copy it there, or write its directory or repository id into {requirement.file}."
            )
    elif name.startswith(PATHS):
        raise UnsupportedModelError(
            f"The base model of {snapshot.repository} is {name!r} ({requirement.file}), a path on the machine where it "
            "was trained. Download the adapter, write the repository id of its base model into that file, and name "
            "its directory in place of the repository."
        )
    return replace(required, source=_source_of(required, snapshot))


def check_base(adapter: Snapshot, base: Snapshot) -> None:
    """Raise UnsupportedModelError if the base model of an adapter is an adapter, too, or has no weights."""
    paths = {file.path for file in base.files}
    if (export := find_export(paths)) is not None:
        raise UnsupportedModelError(
            f"The base model of {adapter.repository} is {base.repository}, which has no weights, only an export "
            f"({export}). Write the repository id of the model that it was made from into {ADAPTER_CONFIG}."
        )
    if is_adapter(paths):
        raise UnsupportedModelError(
            f"The base model of {adapter.repository} is {base.repository}, which is an adapter itself. Merge it into its "
            "own base model (merge_and_unload of PEFT), and use the result as the base model."
        )


def explain(error: HubError, requirement: Requirement, snapshot: Snapshot) -> HubError:
    """Return an error of a download that says why the repository was needed."""
    what = "the base model" if requirement.kind == "base" else "code"
    return type(error)(
        f"{snapshot.repository} needs {what} from {requirement.name} ({requirement.file} names it): {error}"
    )


def _base_of(snapshot: Snapshot) -> Requirement:
    config = _read_json(snapshot.path / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise IncompleteRepositoryError(
            f"{ADAPTER_CONFIG} of {snapshot.repository} is not a JSON object. Download it again, or correct the file."
        )
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name.strip():
        raise UnsupportedModelError(
            f"{snapshot.repository} is a LoRA adapter, and its {ADAPTER_CONFIG} does not name its base model. Write its "
            "repository id or directory into base_model_name_or_path, or merge the adapter into its base model."
        )
    return Requirement(name, "base", ADAPTER_CONFIG, revision if isinstance(revision, str) and revision else None)


def _code_references(snapshot: Snapshot, paths: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each repository that a class is taken from, and the file that names it."""
    for path in paths:
        name = split_path(path)[1]
        if name in _FILES_WITH_CODE:
            content = _read_json(snapshot.path / path)
            references = _texts(content.get("auto_map")) if isinstance(content, dict) else iter(())
        elif path == "modules.json":
            content = _read_json(snapshot.path / path)
            modules = content if isinstance(content, list) else []
            references = (str(module.get("type")) for module in modules if isinstance(module, dict))
        else:
            continue
        for reference in references:
            repository, separator, _ = reference.partition("--")
            if separator and repository:
                yield repository, path


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _directory_of(name: str, directory: Path) -> Path | None:
    """Return the directory that an adapter on this machine names, relative to its own, or to the working directory."""
    try:
        beside = directory / Path(name).expanduser()
        return beside.resolve() if beside.is_dir() else directory_of(name)
    except (OSError, RuntimeError, ValueError):  # the platform cannot look up this name
        return None


def _source_of(required: ModelSpec, snapshot: Snapshot) -> Source:
    """Return the hub of a repository that a model names. Unlike names in the settings, it is never a directory."""
    if required.name == BUNDLED_MODEL and required.endpoint is None and required.revision in {None, BUNDLED_REVISION}:
        return "bundled"
    if required.source in ("huggingface", "modelscope"):
        return required.source
    if snapshot.hub in ("huggingface", "modelscope"):
        return snapshot.hub
    return "modelscope" if required.name.startswith(MODELSCOPE_OWNERS) else "huggingface"


def _read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if it is invalid, which is an error when the model is loaded."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
