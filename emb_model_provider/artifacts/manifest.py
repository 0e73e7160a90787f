"""An artifact on disk: one directory that serves a model without the libraries that made it.

model.xml, model.bin   the whole pipeline as an OpenVINO graph, without a last length normalization
tokenizer.json         a `tokenizers.Tokenizer`, without truncation and padding
manifest.json          written last: what it was made from, how true it is, and every file's size and sha256
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from emb_model_provider.backends.base import Fidelity, ModelDescription
from emb_model_provider.snapshots.files import write_atomically
from emb_model_provider.snapshots.manifest import same_mtime
from emb_model_provider.snapshots.snapshot import hash_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from emb_model_provider.artifacts.recipe import Recipe

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
GRAPH = "model.xml"
WEIGHTS = "model.bin"
TOKENIZER = "tokenizer.json"
FILES = (GRAPH, WEIGHTS, TOKENIZER)


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact whose files were found to be those of its manifest."""

    directory: Path
    description: ModelDescription
    """As compiled: with the repository's prompts, not the operator's."""
    recipe: Mapping[str, Any]
    """What it was made from, as JSON."""
    made_by: str
    """How the graph was had: `torch.export`, `tracing`, or the name of an export that the snapshot ships."""
    size: int
    """Bytes of all its files."""


def write_manifest(directory: Path, recipe: Recipe, description: ModelDescription, *, made_by: str) -> None:
    """Hash a directory's files and write the manifest that makes it an artifact; force all of it to disk.

    Raises: OSError.
    """
    files = []
    for name in FILES:
        path = directory / name
        _flush(path)
        files.append({"path": name, "sha256": hash_file(path).sha256, **_stamp(path)})
    values = asdict(description)
    del values["tokenizer_json"]
    content = {
        "recipe": recipe.as_json(),
        "made_by": made_by,
        "description": values,
        "files": files,
    }
    write_atomically(directory / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False).encode())
    _flush(directory)


def read_artifact(directory: Path) -> Artifact | None:
    """Return the artifact in a directory, or None where there is none or its files are not the manifest's.

    A file of the same size and time stamp is taken to be the same; one with another time stamp is hashed again.
    """
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
        touched = _check_files(directory, content["files"])
        artifact = Artifact(
            directory=directory,
            description=_description(
                content["description"], (directory / TOKENIZER).read_text(encoding="utf-8")
            ),
            recipe=content["recipe"],
            made_by=str(content["made_by"]),
            size=sum(int(entry["size"]) for entry in content["files"]),
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        if directory.is_dir():
            logger.warning("The artifact %s is not whole and will not be used: %s", directory, error)
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The artifact %s is damaged and will not be used: %s", directory, error)
        return None
    if touched:
        _renew(directory, content)
    return artifact


def with_operators_prompts(
    description: ModelDescription, prompts: Mapping[str, str] | None
) -> ModelDescription:
    """Put the operator's prompts over those of the repository, which are what was compiled."""
    return replace(description, prompts={**description.prompts, **(prompts or {})})


def read_fidelity(values: Mapping[str, Any]) -> Fidelity:
    """Read a figure as `asdict` wrote it, now or earlier: figures it lacks are None, others are left out.

    Raises: KeyError or TypeError where it lacks one that was always there.
    """
    known = {field.name for field in fields(Fidelity)}
    return Fidelity(**{name: value for name, value in values.items() if name in known})


def _description(values: Mapping[str, Any], tokenizer_json: str) -> ModelDescription:
    sizes, fidelity = values["matryoshka"], values["fidelity"]
    return ModelDescription(
        **{
            **values,
            "tokenizer_json": tokenizer_json,
            "matryoshka": tuple(sizes) if isinstance(sizes, list) else sizes,
            "notes": tuple(values["notes"]),
            "fidelity": read_fidelity(fidelity) if fidelity is not None else None,
        }
    )


def _check_files(directory: Path, entries: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a file had to be hashed again, since its time stamp is another.

    Raises: ValueError where a file is not the manifest's, OSError where it cannot be read.
    """
    if {entry["path"] for entry in entries} != set(FILES):
        raise ValueError("its manifest names other files")
    touched = False
    for entry in entries:
        path = directory / entry["path"]
        stat = path.stat()
        if stat.st_size != entry["size"]:
            raise ValueError(f"{entry['path']} has another size than its manifest says")
        if not same_mtime(stat.st_mtime_ns, entry["mtime_ns"]):
            touched = True
            if hash_file(path).sha256 != entry["sha256"]:
                raise ValueError(f"{entry['path']} has other bytes than its manifest says")
    return touched


def _renew(directory: Path, content: dict[str, Any]) -> None:
    """Take over new time stamps of files that were hashed again, so that the next start need not."""
    try:
        content["files"] = [{**entry, **_stamp(directory / entry["path"])} for entry in content["files"]]
        write_atomically(directory / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        logger.debug("Could not renew the manifest of %s: %s", directory, error)


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _flush(path: Path) -> None:
    """Force a file, or a directory's entries, to disk where the platform can."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
