"""Selects the files of a repository that serving needs, and checks that they are a model."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from emb_model_provider.errors import CorruptSnapshotError, IncompleteRepositoryError
from emb_model_provider.snapshots.snapshot import is_safe_path

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from emb_model_provider.snapshots.manifest import FilePatterns

NEVER_SERVED: dict[str, tuple[str, ...]] = {
    "data of git": (".git*", "*/.git*"),
    "weights for TensorFlow and Flax": ("*.h5", "*.msgpack"),
    "weights for Rust and llama.cpp": ("*.ot", "*.gguf"),
    "weights for TensorFlow Lite and Core ML": ("*.tflite", "*.mlmodel", "*.mlpackage/*"),
    "exports to ONNX, because models are compiled from the weights": ("*.onnx", "*.onnx_data", "onnx/*", "*/onnx/*"),
    "exports to OpenVINO, likewise": ("openvino/*", "*/openvino/*", "openvino_model*"),
    "the weights again, in another format": ("original/*", "consolidated*"),
    "training state": ("optimizer*.pt", "scheduler*.pt", "rng_state*.pth", "training_args.bin"),
    "training logs": ("runs/*",),
    "images and papers": ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf"),
}
"""Patterns of files that are not downloaded, by the reason. `*` matches slashes, too."""

EXPORTS: dict[str, tuple[str, ...]] = {
    "openvino/openvino_model.xml": ("openvino/openvino_model.bin",),
    "openvino_model.xml": ("openvino_model.bin",),
    "onnx/model.onnx": ("onnx/model.onnx_data", "onnx/model.onnx.data"),
    "model.onnx": ("model.onnx_data", "model.onnx.data"),
}
"""Exports of a transformer that OpenVINO reads, with their companion files. The first one in a local directory replaces a
graph that the compiler cannot make. That is rare, and exports are as large as the weights: none is downloaded."""

_SAFETENSORS = "model*.safetensors"
_TORCH_BIN = "pytorch_model*.bin*"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_IGNORED = [pattern for patterns in NEVER_SERVED.values() for pattern in patterns]
_MAX_SHARDS_SHOWN = 5


def select(paths: Iterable[str], *, with_export: bool = False) -> list[str]:
    """Return the paths that serving needs, sorted, without torch weights beside the same weights as safetensors."""
    paths = set(paths)
    kept = [path for path in paths if not any(fnmatchcase(path.lower(), pattern) for pattern in _IGNORED)]
    have_safetensors = {parent for parent, name in map(_split, kept) if fnmatchcase(name, _SAFETENSORS)}
    return sorted(
        path
        for path in [*kept, *(_export_among(paths) if with_export else ())]
        if not (fnmatchcase(_split(path)[1], _TORCH_BIN) and _split(path)[0] in have_safetensors)
    )


def select_files(available: Collection[str], patterns: FilePatterns, repository: str, origin: str) -> list[str]:
    """Return the files of a hub's listing that serving needs, or those of them that match the patterns."""
    for path in available:
        if not is_safe_path(path):
            raise CorruptSnapshotError(
                f"Repository {repository} lists a file named {path!r}, which would be outside its directory: "
                "nothing was downloaded. Do not use this repository, and report it to its owner."
            )
    paths = select(available)
    if not patterns:
        require_model(paths, origin, available=available)
        return paths
    matching = [path for path in paths if patterns.match(path)]
    if not matching:
        raise IncompleteRepositoryError(
            f"{origin} has no file that serving needs and that matches the patterns (include: "
            f"{', '.join(patterns.include) or 'all'}; exclude: {', '.join(patterns.exclude) or 'none'}). Check the "
            "patterns."
        )
    return matching


def require_model(paths: Iterable[str], origin: str, *, available: Iterable[str]) -> None:
    """Reject files without a configuration or weights, before anything large is downloaded."""
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
    """Reject a model of which a shard is missing, or an index of shards is invalid."""
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
