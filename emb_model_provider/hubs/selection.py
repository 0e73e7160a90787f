"""Which files of a repository serving needs, and whether they make a model."""

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
    ".git*": "the repository's own bookkeeping",
    "*/.git*": "the repository's own bookkeeping",
    "*.h5": "weights for TensorFlow",
    "*.msgpack": "weights for Flax",
    "*.ot": "weights for Rust",
    "*.gguf": "weights for llama.cpp",
    "*.tflite": "weights for TensorFlow Lite",
    "*.mlmodel": "weights for Core ML",
    "*.mlpackage/*": "weights for Core ML",
    "*.onnx": "an export: the compile step makes its own",
    "*.onnx_data": "an export: the compile step makes its own",
    "onnx/*": "an export: the compile step makes its own",
    "*/onnx/*": "an export: the compile step makes its own",
    "openvino/*": "an export: the compile step makes its own",
    "*/openvino/*": "an export: the compile step makes its own",
    "openvino_model*": "an export: the compile step makes its own",
    "original/*": "the weights once more, in their author's own format",
    "consolidated*": "the weights once more, in their author's own format",
    "optimizer*.pt": "training state",
    "scheduler*.pt": "training state",
    "rng_state*.pth": "training state",
    "training_args.bin": "training state",
    "runs/*": "training logs",
    "*.png": "a picture",
    "*.jpg": "a picture",
    "*.jpeg": "a picture",
    "*.gif": "a picture",
    "*.svg": "a picture",
    "*.webp": "a picture",
    "*.pdf": "a paper",
}
"""Pattern to the reason that a file of this name is not fetched. `*` crosses slashes."""

EXPORTS: dict[str, tuple[str, ...]] = {
    "openvino/openvino_model.xml": ("openvino/openvino_model.bin",),
    "openvino_model.xml": ("openvino_model.bin",),
    "onnx/model.onnx": ("onnx/model.onnx_data", "onnx/model.onnx.data"),
    "model.onnx": ("model.onnx_data", "model.onnx.data"),
}
"""Exports of a transformer that OpenVINO reads, and what may lie beside each; the first that there is counts.

One stands in where the compile step cannot make its own. That is rare, and a download as large as the weights: a hub
is never asked for it. In a directory it is at hand.
"""

_SAFETENSORS = "model*.safetensors"
_TORCH_BIN = "pytorch_model*.bin*"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def select(paths: Iterable[str], *, with_export: bool = False) -> list[str]:
    """The paths that serving needs, sorted; `with_export`: and one export, if there is one.

    `pytorch_model*.bin` is dropped where the same directory holds the weights as safetensors.
    """
    paths = set(paths)
    kept = [path for path in paths if not any(fnmatchcase(path.lower(), pattern) for pattern in NEVER_SERVED)]
    have_safetensors = {parent for parent, name in map(_split, kept) if fnmatchcase(name, _SAFETENSORS)}
    return sorted(
        path
        for path in [*kept, *(_export_among(paths) if with_export else ())]
        if not (fnmatchcase(_split(path)[1], _TORCH_BIN) and _split(path)[0] in have_safetensors)
    )


def select_files(listing: Collection[str], config: HubConfig, repository: str, where: str) -> list[str]:
    """The files of a hub's listing that serving needs, or those of them that `config` asks for.

    Raises: IncompleteRepositoryError; CorruptSnapshotError where a name leads out of the snapshot's directory.
    """
    require_safe_paths(listing, repository)
    paths = select(listing)
    if config.partial:
        return _matching(paths, config.include, config.exclude, where)
    require_model(paths, where, listing=listing)
    return paths


def _matching(
    paths: Iterable[str], include: tuple[str, ...], exclude: tuple[str, ...], where: str
) -> list[str]:
    """The paths that match a pattern of `include`, or all where it is empty, but those that match one of `exclude`.

    Raises: IncompleteRepositoryError where none is left.
    """
    found = [
        path
        for path in paths
        if (not include or any(fnmatchcase(path, pattern) for pattern in include))
        and not any(fnmatchcase(path, pattern) for pattern in exclude)
    ]
    if not found:
        raise IncompleteRepositoryError(
            f"{where} has no file that serving needs and that matches the patterns (include: "
            f"{', '.join(include) or 'all'}; exclude: {', '.join(exclude) or 'none'}). Check the patterns."
        )
    return found


def require_model(paths: Iterable[str], where: str, *, listing: Iterable[str] = ()) -> None:
    """Refuse files that cannot be a model, before anything large is fetched. `listing`: all that there are.

    Raises: IncompleteRepositoryError.
    """
    names = set(paths)
    if not names & {"config.json", "modules.json"}:
        raise IncompleteRepositoryError(
            f"{where} has no config.json (and no modules.json): it is not a model that can be served. "
            "Check EMB_PROVIDER_MODEL_NAME and EMB_PROVIDER_MODEL_REVISION."
        )
    if not any(fnmatchcase(_split(path)[1], pattern) for path in names for pattern in _WEIGHTS):
        only_export = [path for path in listing if path.endswith((".onnx", "openvino_model.xml"))]
        if only_export:
            raise IncompleteRepositoryError(
                f"{where} has no weights (*.safetensors or pytorch_model.bin), only an export ({min(only_export)}). "
                "Vectors of an export are compared with those of the weights before they are served. Choose the "
                "repository that it was made from: EMB_PROVIDER_MODEL_NAME."
            )
        raise IncompleteRepositoryError(
            f"{where} has no weights (*.safetensors or pytorch_model.bin). Choose a repository or a revision "
            "that holds them: EMB_PROVIDER_MODEL_NAME, EMB_PROVIDER_MODEL_REVISION."
        )


def require_all_parts(directory: Path, paths: Iterable[str], where: str) -> None:
    """Refuse a model of which a shard is missing.

    Raises: IncompleteRepositoryError.
    """
    names = set(paths)
    missing: list[str] = []
    for index in sorted(
        name for name in names if name.endswith((".safetensors.index.json", ".bin.index.json"))
    ):
        weight_map = _read_json(directory / index, where).get("weight_map")
        parent = _split(index)[0]
        shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing += [path for path in (f"{parent}{shard}" for shard in shards) if path not in names]
    if missing:
        raise IncompleteRepositoryError(
            f"{where} names weights that are not there: {', '.join(missing[:5])}. Fetch or copy all of its files."
        )


def _export_among(paths: set[str]) -> list[str]:
    for export, beside in EXPORTS.items():
        if export in paths:
            return [export, *(path for path in beside if path in paths)]
    return []


def _split(path: str) -> tuple[str, str]:
    """A path's directory, with its slash ("" at the top), and its name."""
    parent, slash, name = path.rpartition("/")
    return f"{parent}{slash}", name


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IncompleteRepositoryError(
            f"{where} has a {PurePosixPath(path).name} that cannot be read ({error}). Fetch it again."
        ) from error
    return content if isinstance(content, dict) else {}
