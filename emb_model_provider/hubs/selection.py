"""Selects the files of a repository that serving needs, and checks that they are a model."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from emb_model_provider.errors import IncompleteRepositoryError
from emb_model_provider.snapshots.snapshot import require_safe_paths

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from emb_model_provider.hubs.base import HubConfig

NEVER_SERVED: dict[str, str] = {
    ".git*": "data of git",
    "*/.git*": "data of git",
    "*.h5": "weights for TensorFlow",
    "*.msgpack": "weights for Flax",
    "*.ot": "weights for Rust",
    "*.gguf": "weights for llama.cpp",
    "*.tflite": "weights for TensorFlow Lite",
    "*.mlmodel": "weights for Core ML",
    "*.mlpackage/*": "weights for Core ML",
    "*.onnx": "an export: models are compiled from the weights",
    "*.onnx_data": "an export: models are compiled from the weights",
    "onnx/*": "an export: models are compiled from the weights",
    "*/onnx/*": "an export: models are compiled from the weights",
    "openvino/*": "an export: models are compiled from the weights",
    "*/openvino/*": "an export: models are compiled from the weights",
    "openvino_model*": "an export: models are compiled from the weights",
    "original/*": "the weights again, in another format",
    "consolidated*": "the weights again, in another format",
    "optimizer*.pt": "training state",
    "scheduler*.pt": "training state",
    "rng_state*.pth": "training state",
    "training_args.bin": "training state",
    "runs/*": "training logs",
    "*.png": "an image",
    "*.jpg": "an image",
    "*.jpeg": "an image",
    "*.gif": "an image",
    "*.svg": "an image",
    "*.webp": "an image",
    "*.pdf": "a paper",
}
"""Patterns of files that are not downloaded, with the reason. `*` matches slashes, too."""

EXPORTS: dict[str, tuple[str, ...]] = {
    "openvino/openvino_model.xml": ("openvino/openvino_model.bin",),
    "openvino_model.xml": ("openvino_model.bin",),
    "onnx/model.onnx": ("onnx/model.onnx_data", "onnx/model.onnx.data"),
    "model.onnx": ("model.onnx_data", "model.onnx.data"),
}
"""Exports of a transformer that OpenVINO reads, each with its possible companion files. The first that exists is used.

An export replaces a graph that the compiler cannot make. That is rare, and an export is as large as the weights, so that
none is downloaded from a hub; one in a local directory is used.
"""

_SAFETENSORS = "model*.safetensors"
_TORCH_BIN = "pytorch_model*.bin*"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_MAX_SHARDS_SHOWN = 5


def select(paths: Iterable[str], *, with_export: bool = False) -> list[str]:
    """Return the paths that serving needs, sorted.

    `pytorch_model*.bin` is left out if its directory contains the weights as safetensors.

    Args:
        paths: All paths of a repository.
        with_export: Include one export, if there is one.
    """
    paths = set(paths)
    kept = [path for path in paths if not any(fnmatchcase(path.lower(), pattern) for pattern in NEVER_SERVED)]
    have_safetensors = {parent for parent, name in map(_split, kept) if fnmatchcase(name, _SAFETENSORS)}
    return sorted(
        path
        for path in [*kept, *(_export_among(paths) if with_export else ())]
        if not (fnmatchcase(_split(path)[1], _TORCH_BIN) and _split(path)[0] in have_safetensors)
    )


def select_files(available: Collection[str], config: HubConfig, repository: str, origin: str) -> list[str]:
    """Return the files of a hub's listing that serving needs, or those of them that `config` requests.

    Args:
        available: All paths of the repository.
        config: The hub's configuration, with the patterns of the requested files.
        repository: The repository.
        origin: The repository and the revision, as messages name them.

    Raises:
        IncompleteRepositoryError: They are not a model, or the patterns match none.
        CorruptSnapshotError: A path leads out of the snapshot's directory.
    """
    require_safe_paths(available, repository)
    paths = select(available)
    if config.partial:
        return _matching(paths, config.include, config.exclude, origin)
    require_model(paths, origin, available=available)
    return paths


def require_model(paths: Iterable[str], origin: str, *, available: Iterable[str] = ()) -> None:
    """Reject files that cannot be a model, before anything large is downloaded.

    Args:
        paths: The selected paths.
        origin: The repository or the directory, as messages name it.
        available: All paths.

    Raises:
        IncompleteRepositoryError: A configuration or weights are missing.
    """
    names = set(paths)
    if not names & {"config.json", "modules.json"}:
        raise IncompleteRepositoryError(
            f"{origin} has no config.json (and no modules.json): it is not a model that can be served. "
            "Check EMB_PROVIDER_MODEL_NAME and EMB_PROVIDER_MODEL_REVISION."
        )
    if not any(fnmatchcase(_split(path)[1], pattern) for path in names for pattern in _WEIGHTS):
        exports = [path for path in available if path.endswith((".onnx", "openvino_model.xml"))]
        if exports:
            raise IncompleteRepositoryError(
                f"{origin} has no weights (*.safetensors or pytorch_model.bin), only an export ({min(exports)}). "
                "The vectors of an export are compared with those of the weights before they are served. Set "
                "EMB_PROVIDER_MODEL_NAME to the repository that it was made from."
            )
        raise IncompleteRepositoryError(
            f"{origin} has no weights (*.safetensors or pytorch_model.bin). Choose a repository or a revision "
            "that has them: EMB_PROVIDER_MODEL_NAME, EMB_PROVIDER_MODEL_REVISION."
        )


def require_all_parts(directory: Path, paths: Iterable[str], origin: str) -> None:
    """Reject a model of which a shard is missing.

    Args:
        directory: The directory of the files.
        paths: Their paths.
        origin: The repository or the directory, as messages name it.

    Raises:
        IncompleteRepositoryError: A shard is missing, or an index of shards is invalid.
    """
    names = set(paths)
    missing: list[str] = []
    for index in sorted(name for name in names if name.endswith((".safetensors.index.json", ".bin.index.json"))):
        weight_map = _read_json(directory / index, origin).get("weight_map")
        parent = _split(index)[0]
        shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing += [path for path in (f"{parent}{shard}" for shard in shards) if path not in names]
    if missing:
        raise IncompleteRepositoryError(
            f"{origin} lists weights that do not exist: {', '.join(missing[:_MAX_SHARDS_SHOWN])}. Download or copy all "
            "of its files."
        )


def _matching(paths: Iterable[str], include: tuple[str, ...], exclude: tuple[str, ...], origin: str) -> list[str]:
    matching = [
        path
        for path in paths
        if (not include or any(fnmatchcase(path, pattern) for pattern in include))
        and not any(fnmatchcase(path, pattern) for pattern in exclude)
    ]
    if not matching:
        raise IncompleteRepositoryError(
            f"{origin} has no file that serving needs and that matches the patterns (include: "
            f"{', '.join(include) or 'all'}; exclude: {', '.join(exclude) or 'none'}). Check the patterns."
        )
    return matching


def _export_among(paths: set[str]) -> list[str]:
    for export, companions in EXPORTS.items():
        if export in paths:
            return [export, *(path for path in companions if path in paths)]
    return []


def _split(path: str) -> tuple[str, str]:
    """Return the directory of a path, with its slash ("" at the top), and its name."""
    parent, slash, name = path.rpartition("/")
    return f"{parent}{slash}", name


def _read_json(path: Path, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IncompleteRepositoryError(
            f"{origin} has a {PurePosixPath(path).name} that cannot be read ({error}). Download it again."
        ) from error
    return content if isinstance(content, dict) else {}
