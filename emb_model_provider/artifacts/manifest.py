"""An artifact on disk: one directory that serves a model without the libraries that compiled it.

model.xml, model.bin   the whole pipeline as an OpenVINO graph, without a final length normalization
tokenizer.json         a `tokenizers.Tokenizer`, without truncation and padding
manifest.json          written last: the recipe, the measured fidelity, and the size and sha256 of every file
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from emb_model_provider.backends.base import Calibration, Fidelity, ModelDescription
from emb_model_provider.snapshots.files import MUST_HASH, check_files, write_atomically
from emb_model_provider.snapshots.snapshot import SnapshotFile, hash_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from emb_model_provider.artifacts.recipe import Recipe

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
GRAPH = "model.xml"
WEIGHTS = "model.bin"
TOKENIZER = "tokenizer.json"
FILES = (GRAPH, WEIGHTS, TOKENIZER)


@dataclass(frozen=True, slots=True)
class ArtifactInfo:
    """An artifact as its manifest describes it. Its files were not looked at."""

    directory: Path
    recipe: Mapping[str, Any]
    """What it was made from, as JSON."""
    description: Mapping[str, Any]
    """Values of its ModelDescription, without the tokenizer."""
    made_by: str
    """The name of its exporter, or of a prebuilt export."""
    files: tuple[SnapshotFile, ...]
    mtimes: Mapping[str, int]
    """Time stamps of the files when they were hashed, in nanoseconds."""
    last_used: float
    """Unix time in seconds."""

    @property
    def key(self) -> str:
        """The digest of its recipe, which is the name of its directory."""
        return self.directory.name

    @property
    def snapshot(self) -> str:
        """The digest of its snapshot."""
        return str(self.recipe["snapshot"])

    @property
    def weights(self) -> str:
        """Precision of the stored weights."""
        return str(self.recipe["weights"])

    @property
    def computed(self) -> str:
        """Precision of the computation."""
        return str(self.description.get("compute") or self.description.get("precision"))

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(file.size for file in self.files)

    @property
    def fidelity(self) -> Fidelity | None:
        values = self.description.get("fidelity")
        return read_fidelity(values) if values is not None else None


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact whose files match its manifest."""

    directory: Path
    description: ModelDescription
    """As compiled: with the prompts of the repository, not those of the settings."""
    made_by: str
    size: int
    """In bytes."""


def write_manifest(directory: Path, recipe: Recipe, description: ModelDescription, *, made_by: str) -> None:
    """Hash the files of a directory and write the manifest that makes it an artifact; flush all of it to disk."""
    files = []
    for name in FILES:
        path = directory / name
        _flush(path)
        hashes = hash_file(path)
        entry = {"path": name, "sha256": hashes.sha256, "size": hashes.size, "mtime_ns": path.stat().st_mtime_ns}
        files.append(entry)
    values = asdict(description)
    del values["tokenizer_json"]
    _write(directory, {"recipe": recipe.as_json(), "made_by": made_by, "description": values, "files": files})
    _flush(directory)


def read_info(directory: Path) -> ArtifactInfo | None:
    """Read the manifest of an artifact; None if there is none or it is invalid."""
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
        return _parse(directory, content)
    except (FileNotFoundError, NotADirectoryError) as error:
        if directory.is_dir():
            logger.warning("The artifact %s is incomplete and is ignored: %s", directory, error)
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The artifact %s is damaged and is ignored: %s", directory, error)
        return None


def read_artifact(directory: Path) -> Artifact | None:
    """Return the artifact in a directory; None if there is none or its files differ from its manifest.

    A file whose size and time stamp are unchanged counts as unchanged; one with another time stamp is hashed again.
    """
    info = read_info(directory)
    if info is None:
        return None
    check = check_files(directory, info.files, info.mtimes)
    if not check.ok:
        problem = check.problems[0]
        logger.warning("The artifact %s is damaged and is ignored: %s (%s)", directory, problem.path, problem.problem)
        return None
    try:
        tokenizer = (directory / TOKENIZER).read_text(encoding="utf-8")
        description = _description(info.description, tokenizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The artifact %s is damaged and is ignored: %s", directory, error)
        return None
    if check.hashed:
        _record_mtimes(directory, check.hashed)
    return Artifact(directory, description, info.made_by, info.size)


def verify_artifact(directory: Path) -> bool:
    """Hash the files of an artifact, and return whether they match its manifest.

    Files that do not match are hashed again before the artifact is used, so that it is compiled again.
    """
    info = read_info(directory)
    if info is None:
        return False
    check = check_files(directory, info.files)
    wrong = [problem.path for problem in check.problems if problem.problem == "bytes"]
    if wrong:
        _record_mtimes(directory, dict.fromkeys(wrong, MUST_HASH))
    return check.ok


def read_fidelity(values: Mapping[str, Any]) -> Fidelity:
    """Read a fidelity that this or an earlier version wrote. Missing values are None, unknown ones are ignored.

    TypeError is raised if a value is missing that every version has written.
    """
    known = {field.name for field in fields(Fidelity)}
    calibration = _read_calibration(values.get("calibration"))
    return Fidelity(**{name: value for name, value in values.items() if name in known} | {"calibration": calibration})


def _read_calibration(values: Mapping[str, Any] | None) -> Calibration | None:
    return Calibration(**values) if values is not None else None


def _parse(directory: Path, content: Mapping[str, Any]) -> ArtifactInfo:
    entries = content["files"]
    if {entry["path"] for entry in entries} != set(FILES):
        raise ValueError("its manifest names other files")
    info = ArtifactInfo(
        directory=directory,
        recipe=content["recipe"],
        description=dict(content["description"]),
        made_by=str(content["made_by"]),
        files=tuple(SnapshotFile(entry["path"], int(entry["size"]), entry["sha256"]) for entry in entries),
        mtimes={entry["path"]: int(entry["mtime_ns"]) for entry in entries},
        last_used=directory.stat().st_mtime,
    )
    _ = (info.snapshot, info.weights, info.fidelity)  # raises if one is missing
    return info


def _description(values: Mapping[str, Any], tokenizer_json: str) -> ModelDescription:
    sizes, fidelity = values["matryoshka"], values["fidelity"]
    return ModelDescription(
        **{
            **values,
            "tokenizer_json": tokenizer_json,
            "matryoshka": tuple(sizes) if isinstance(sizes, list) else sizes,
            "notes": tuple(values["notes"]),
            "fidelity": read_fidelity(fidelity) if fidelity is not None else None,
            "own_calibration": _read_calibration(values.get("own_calibration")),
        }
    )


def _record_mtimes(directory: Path, mtimes: Mapping[str, int]) -> None:
    """Replace the recorded time stamps of some files, so that the next start need not hash them, or must do so."""
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
        for entry in content["files"]:
            entry["mtime_ns"] = mtimes.get(entry["path"], entry["mtime_ns"])
        _write(directory, content)
    except OSError as error:
        logger.debug("Could not update the manifest of %s: %s", directory, error)


def _write(directory: Path, content: Mapping[str, Any]) -> None:
    write_atomically(directory / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False).encode())


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk if the platform can."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
