"""An artifact on disk: one directory that serves a model without the libraries that compiled it.

model.xml, model.bin   the whole pipeline as an OpenVINO graph, without a final length normalization
tokenizer.json         a `tokenizers.Tokenizer`, without truncation and padding
manifest.json          written last: the recipe, the measured fidelity, the vector of a fixed input, and the size and
                       sha256 of every file

At each load the small files are hashed, and the vector of the fixed input is compared, which shows damaged weights within
milliseconds. Hashing the weights would take seconds, so it is done only if their time stamp or this vector differs.
"""

from __future__ import annotations

import json
import logging
import os
from base64 import b64decode, b64encode
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from emb_model_provider.backends.base import (
    Calibration,
    Fidelity,
    ModelDescription,
    MultiVectorFidelity,
    PairTemplate,
    ScoreFidelity,
    SparseFidelity,
    TokenBatch,
    TokenRules,
    Tuning,
)
from emb_model_provider.backends.hardware import processor
from emb_model_provider.snapshots.files import MUST_HASH, check_files, write_atomically
from emb_model_provider.snapshots.snapshot import SnapshotFile, hash_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from emb_model_provider.artifacts.recipe import Recipe
    from emb_model_provider.backends.base import Backend

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
GRAPH = "model.xml"
WEIGHTS = "model.bin"
TOKENIZER = "tokenizer.json"
FILES = (GRAPH, WEIGHTS, TOKENIZER)

_PROBE_TOKENS = 128
"""Tokens of the fixed input, whose ids are spread over the vocabulary, so that it reads all parts of the token table."""
_PROBE_SCORES, _PROBE_TERMS = 8, 256
"""Number of fixed inputs for scores, and of values to which the weights of a sparse vector are added up."""
_MAX_PROBE_DIFFERENCE = 1e-4
"""Largest difference of the cosine to the recorded vector. Another processor can exceed it, too: then hashing decides."""
_FIDELITY_PARTS: Mapping[str, Callable[..., Any]] = {
    "calibration": Calibration,
    "scores": ScoreFidelity,
    "sparse": SparseFidelity,
    "multi_vector": MultiVectorFidelity,
}
"""Values of a fidelity that are objects."""


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
    probe: str
    """The vector of the fixed input in base64; empty if an earlier version made the artifact."""
    last_used: float
    """Unix time in seconds."""
    tunings: Mapping[str, Mapping[str, Any]]
    """The fastest options by processor; see `Tuning`."""

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
    probe: NDArray[np.float32]
    """The results for the fixed inputs when the artifact was made; see `probe`."""


def probe(backend: Backend) -> NDArray[np.float32]:
    """Return the results for fixed inputs as one vector: dense vectors as they are, and others in a shorter form.

    Scores are the only results with several inputs, because a single score has no direction.
    """
    import numpy as np  # here and below, because listing models needs the types of this module, but not numpy

    description = backend.description
    length = min(_PROBE_TOKENS, description.max_length)
    ids = [position * description.vocab_size // length for position in range(length)]
    rows = [ids[shift:] + ids[:shift] for shift in range(_PROBE_SCORES if "scores" in description.outputs else 1)]
    results = backend.run(TokenBatch(ids=rows, prompt_lengths=[0] * len(rows)))
    parts: list[NDArray[np.float32]] = []
    if results.dense is not None:
        parts.append(results.dense[0])
    if results.scores is not None:
        parts.append(results.scores.reshape(-1))
    if results.sparse is not None:
        folded = np.zeros(_PROBE_TERMS, dtype=np.float32)
        np.add.at(folded, results.sparse[0].indices % _PROBE_TERMS, results.sparse[0].values)
        parts.append(folded)
    if results.multi_vector is not None:
        parts.append(results.multi_vector[0].sum(axis=0))
    return np.concatenate(parts)


def is_same_probe(actual: NDArray[np.float32], recorded: NDArray[np.float32]) -> bool:
    """Return whether two results for the fixed inputs are those of the same weights. Non-finite values are not."""
    import numpy as np

    if actual.shape != recorded.shape:
        return False
    a, b = actual.astype(np.float64), recorded.astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return bool(float(a @ b) >= (1 - _MAX_PROBE_DIFFERENCE) * norms and np.isfinite(norms))


def write_manifest(
    directory: Path, recipe: Recipe, description: ModelDescription, *, made_by: str, probe: NDArray[np.float32]
) -> None:
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
    content = {"recipe": recipe.as_json(), "made_by": made_by, "description": values, "files": files}
    content["tunings"] = {processor(): values.pop("tuning")}
    content["probe"] = b64encode(probe.astype("<f4").tobytes()).decode()
    _write(directory, content)
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

    The weights count as unchanged if their size and time stamp are; see `is_same_probe`. The other files are hashed.
    """
    info = read_info(directory)
    if info is None:
        return None
    check = check_files(directory, info.files, {**dict.fromkeys(FILES, MUST_HASH), WEIGHTS: info.mtimes[WEIGHTS]})
    if not check.ok:
        problem = check.problems[0]
        logger.warning("The artifact %s is damaged and is ignored: %s (%s)", directory, problem.path, problem.problem)
        return None
    try:
        tokenizer = (directory / TOKENIZER).read_text(encoding="utf-8")
        description = read_description({**info.description, "tokenizer_json": tokenizer})
        description = replace(description, tuning=_read_tuning(info.tunings.get(processor(), {})))
        vector = _read_vector(info.probe)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The artifact %s is damaged and is ignored: %s", directory, error)
        return None
    if WEIGHTS in check.hashed:
        _record_mtimes(directory, check.hashed)
    return Artifact(directory, description, info.made_by, info.size, vector)


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
    parts = {name: read(**values[name]) for name, read in _FIDELITY_PARTS.items() if values.get(name) is not None}
    return Fidelity(**{name: value for name, value in values.items() if name in known} | parts)


def read_description(values: Mapping[str, Any]) -> ModelDescription:
    """Read a description from JSON; ValueError, KeyError or TypeError if it is something else."""
    sizes, fidelity = values["matryoshka"], values["fidelity"]
    return ModelDescription(
        **{
            **values,
            "matryoshka": tuple(sizes) if isinstance(sizes, list) else sizes,
            "notes": tuple(values["notes"]),
            "routes": {task: read_description(each) for task, each in values.get("routes", {}).items()},
            "fidelity": read_fidelity(fidelity) if fidelity is not None else None,
            "own_calibration": _read_calibration(values.get("own_calibration")),
            **{name: tuple(values[name]) for name in ("arrays", "labels")},
            "pair_template": _read_template(values["pair_template"]),
            "token_rules": _read_rules(values["token_rules"]),
        }
    )


def record_tuning(directory: Path, tuning: Tuning) -> None:
    """Record the fastest options on this processor; OSError if the manifest cannot be written."""
    content = json.loads((directory / MANIFEST).read_bytes())
    content.setdefault("tunings", {})[processor()] = asdict(tuning)
    _write(directory, content)


def _read_tuning(values: Mapping[str, Any]) -> Tuning:
    """Read the options that this or another version wrote. Unknown ones are ignored."""
    known = {field.name for field in fields(Tuning)}
    return Tuning(**{name: value for name, value in values.items() if name in known})


def _read_calibration(values: Mapping[str, Any] | None) -> Calibration | None:
    return Calibration(**values) if values is not None else None


def _read_template(values: Mapping[str, Any] | None) -> PairTemplate | None:
    if values is None:
        return None
    around = values["around_instruction"]
    return PairTemplate(**{**values, "around_instruction": tuple(around) if around is not None else None})


def _read_rules(values: Mapping[str, Any] | None) -> TokenRules | None:
    if values is None:
        return None
    rules: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
    return TokenRules(**rules)


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
        probe=str(content.get("probe") or ""),
        last_used=directory.stat().st_mtime,
        tunings=dict(content.get("tunings") or {}),
    )
    _ = (info.snapshot, info.weights, info.fidelity)  # raises if one is missing
    return info


def _read_vector(encoded: str) -> NDArray[np.float32]:
    import numpy as np

    return np.frombuffer(b64decode(encoded), dtype="<f4")


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
