"""Selects the files of a repository that serving needs, and checks that they are a model."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from emb_model_provider.errors import CorruptSnapshotError, IncompleteRepositoryError
from emb_model_provider.hubs.listing import MAX_NAME_BYTES, is_plain_path
from emb_model_provider.snapshots.snapshot import is_safe_path
from emb_model_provider.snapshots.weights import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ONNX_EXPORTS,
    OPENVINO_EXPORTS,
    best_variant,
    companions_of,
    find_export,
    is_adapter,
    is_variant,
    is_weights,
    missing_weights_of,
    split_path,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
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

EXPORTS = (*OPENVINO_EXPORTS, *reversed(ONNX_EXPORTS))
"""Exports of a transformer that OpenVINO reads. The first one in a local directory replaces a graph that the compiler
cannot make. That is rare, and exports are as large as the weights: none is downloaded if there are weights."""

_SAFETENSORS_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_BIN_SHARD = re.compile(r"pytorch_model-\d+-of-\d+\.bin")
_SAFETENSORS_INDEX = "model.safetensors.index.json"
_BIN_INDEX = "pytorch_model.bin.index.json"
_TORCH_BIN = "pytorch_model*.bin*"
_MODULE_FOLDER = re.compile(r"(.*/)?(\w+_)?\d+_\w+/")
_IGNORED = [pattern for patterns in NEVER_SERVED.values() for pattern in patterns]
_MAX_NAMES_SHOWN = 5

_OTHER_FORMATS: tuple[tuple[str, str], ...] = (
    ("*.gguf", "GGUF weights, which llama.cpp reads"),
    ("tf_model*.h5", "TensorFlow weights"),
    ("saved_model.pb", "TensorFlow weights"),
    ("flax_model*.msgpack", "Flax weights"),
    ("*.tflite", "TensorFlow Lite weights"),
    ("*.mlmodel", "Core ML weights"),
    ("rust_model.ot", "weights for Rust"),
    ("*.ckpt", "a checkpoint of training"),
    ("*.pt", "weights in a format of their own"),
    ("*.pth", "weights in a format of their own"),
)
_LFS_POINTER = b"version https://git-lfs"
_LFS_POINTER_MAX_BYTES = 1024
_DOCUMENTS = ("*.md", "license*", "notice*", "*.ipynb", "*.csv", "*.tsv", "*.html", "*.log", "*.yaml", "*.yml")

_MODULE_FILES = {
    "BoW": "config.json",
    "CNN": "cnn_config.json",
    "Dense": "config.json",
    "Dropout": "config.json",
    "LSTM": "lstm_config.json",
    "LayerNorm": "config.json",
    "Pooling": "config.json",
    "Router": "router_config.json",
    "SparseAutoEncoder": "config.json",
    "SparseStaticEmbedding": "config.json",
    "SpladePooling": "config.json",
    "StaticEmbedding": "tokenizer.json",
    "Transformer": "config.json",
    "WeightedLayerPooling": "config.json",
    "WordEmbeddings": "wordembedding_config.json",
    "WordWeights": "config.json",
}
"""Modules of sentence-transformers that cannot be loaded without a file in their folder. Others, such as Normalize, can."""


def select(paths: Iterable[str], *, with_export: bool = False) -> list[str]:
    """Return the paths that serving needs, sorted.

    Of the weights in a directory these are the ones that transformers reads; weights at another precision only if there
    are no others. An export to ONNX or OpenVINO is selected if there are no weights or, with `with_export`, beside them.
    """
    paths = set(paths)
    kept = {path for path in paths if not any(fnmatchcase(path.lower(), pattern) for pattern in _IGNORED)}
    by_parent: dict[str, set[str]] = {}
    for parent, name in map(split_path, kept):
        by_parent.setdefault(parent, set()).add(name)
    has_code = any(path.endswith(".py") for path in kept)
    for parent, names in by_parent.items():
        unread = _unread_weights(names) | _unread_adapters(parent, names, has_code=has_code)
        kept -= {f"{parent}{name}" for name in unread}
    export = find_export(
        kept | {path for path in paths if path.endswith((".onnx", "openvino_model.xml", "openvino_model.bin"))}
    )
    if export is None and with_export:
        export = next((each for each in EXPORTS if each in paths and not missing_weights_of(each, paths)), None)
    if export is not None:
        kept |= {export, *companions_of(export, paths)}
    return sorted(kept)


def _unread_weights(names: set[str]) -> set[str]:
    """Return the weights in a directory that transformers does not read, because it prefers others."""
    shards = {name for name in names if _SAFETENSORS_SHARD.fullmatch(name)}
    bin_files = {name for name in names if fnmatchcase(name, _TORCH_BIN)}
    variants = {name for name in names if is_variant(name)}
    safetensors = {name for name in names - variants if name.endswith(".safetensors") and is_weights(name)}
    unread: set[str] = set()
    if "model.safetensors" in names:
        unread |= bin_files | shards | {_SAFETENSORS_INDEX}
    elif _SAFETENSORS_INDEX in names and safetensors:
        unread |= bin_files
    elif "pytorch_model.bin" in names:
        unread |= {_SAFETENSORS_INDEX, _BIN_INDEX, *(name for name in bin_files if _BIN_SHARD.fullmatch(name))}
    elif bin_files <= variants:
        best = best_variant(variants)
        return variants - {best}
    return (unread | variants) & names


def _unread_adapters(parent: str, names: set[str], *, has_code: bool) -> set[str]:
    """Return the files of adapters in a directory that no library loads, unless code of the repository does."""
    adapter = {ADAPTER_CONFIG, *ADAPTER_WEIGHTS} & names
    if parent:
        return set() if has_code or _MODULE_FOLDER.fullmatch(parent) else adapter
    is_whole = any(is_weights(name) for name in names)
    is_complete = ADAPTER_CONFIG in adapter and len(adapter) > 1
    return adapter if is_whole and not is_complete else set()


def select_files(available: Collection[str], patterns: FilePatterns, repository: str, origin: str) -> list[str]:
    """Return the files of a hub's listing that serving needs, or those of them that match the patterns."""
    for path in available:
        if not is_plain_path(path):
            raise CorruptSnapshotError(
                f"Repository {repository} lists a file named {path[:200]!r}, which has invisible characters, spaces at an end, "
                f"or more than {MAX_NAME_BYTES} bytes: nothing was downloaded. Do not use this repository."
            )
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
    """Reject files without a configuration or weights, before anything large is downloaded.

    Args:
        paths: The selected files.
        origin: What they belong to, as the beginning of a message.
        available: All files, to say what is there.
    """
    names = set(paths)
    if is_adapter(names):
        return
    has_weights = any(is_weights(path) for path in names)
    export = find_export(names)
    has_config = bool(names & {"config.json", "modules.json"}) or (export is not None and "tokenizer.json" in names)
    if has_config and (has_weights or export is not None):
        return
    available = sorted(available)
    if not has_weights and export is None:
        raise IncompleteRepositoryError(f"{origin} {_describe_without_weights(names, available)}")
    raise IncompleteRepositoryError(
        f"{origin} has no config.json (and no modules.json): it is not a model that can be served. "
        "Check the name and the revision."
    )


def _describe_without_weights(names: Collection[str], available: Sequence[str]) -> str:
    """Return what a repository without weights has instead, and what to do, as the end of a sentence."""
    choose = "Choose a repository or a revision that has safetensors or pytorch_model.bin."
    if ADAPTER_CONFIG in names:
        return f"is a LoRA adapter without weights ({' or '.join(ADAPTER_WEIGHTS)}). Download or copy all of its files."
    if any(name in names for name in ADAPTER_WEIGHTS):
        return f"has the weights of a LoRA adapter, but no {ADAPTER_CONFIG}. Download or copy all of its files."
    folder = next((split_path(name)[0] for name in sorted(names) if name.endswith(f"/{ADAPTER_CONFIG}")), None)
    if folder is not None:
        return (
            f"has only a LoRA adapter in the folder {folder.rstrip('/')}. Merge it into its base model, or copy the files of "
            "the folder to a directory of their own, and name that directory in place of the repository."
        )
    for pattern, what in _OTHER_FORMATS:
        found = [path for path in available if fnmatchcase(split_path(path)[1].lower(), pattern)]
        if found:
            return f"has only {what} ({_shortened(found)}), which cannot be served. {choose}"
    onnx = [path for path in available if path.endswith(".onnx")]
    if onnx:
        return (
            f"has no weights (*.safetensors or pytorch_model.bin), but several ONNX files ({_shortened(onnx)}), and "
            "nothing says which one is meant. Copy one of them to model.onnx in a directory of its own, with the other "
            "files of the repository, and name that directory in place of the repository."
        )
    variants = [path for path in available if is_variant(split_path(path)[1])]
    if variants:
        return (
            f"has no weights that can be loaded, only those of a variant ({_shortened(variants)}). Rename them to "
            f"model.safetensors or pytorch_model.bin. {choose}"
        )
    if not {"config.json", "modules.json"} & set(names):
        return (
            "has no config.json (and no modules.json), and no weights: it is not a model that can be served. Check the "
            "name and the revision."
        )
    return f"has no weights (*.safetensors or pytorch_model.bin). {choose}"


def require_all_parts(directory: Path, paths: Iterable[str], origin: str) -> None:
    """Reject a model of which a file is missing that other files name, or of which a file was not downloaded."""
    names = set(paths)
    _require_no_pointers(directory, names, origin)
    _require_shards(directory, names, origin)
    _require_modules(directory, names, origin)


def is_document(path: str) -> bool:
    """Return whether a file is for readers only, so that a model can be loaded without it."""
    return any(fnmatchcase(split_path(path)[1].lower(), pattern) for pattern in _DOCUMENTS)


def _require_no_pointers(directory: Path, names: Iterable[str], origin: str) -> None:
    for name in sorted(names):
        path = directory / name
        if is_document(name) or path.stat().st_size > _LFS_POINTER_MAX_BYTES:
            continue
        with path.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise IncompleteRepositoryError(
                f"{origin} was copied without its large files: {name} is only a pointer of Git LFS. Run `git lfs pull` "
                "in the directory of the repository, or download it with `emb-provider pull`."
            )


def _require_shards(directory: Path, names: Collection[str], origin: str) -> None:
    missing: list[str] = []
    for index in sorted(name for name in names if name.endswith((".safetensors.index.json", ".bin.index.json"))):
        content = _read_json(directory / index, origin)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        parent = split_path(index)[0]
        shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
        missing += [path for path in (f"{parent}{shard}" for shard in shards) if path not in names]
    if missing:
        raise IncompleteRepositoryError(
            f"{origin} lists weights that do not exist: {_shortened(missing)}. Download or copy all of its files."
        )


def _require_modules(directory: Path, names: Collection[str], origin: str) -> None:
    modules = _read_json(directory / "modules.json", origin) if "modules.json" in names else []
    for module in modules if isinstance(modules, list) else []:
        if not isinstance(module, dict):
            continue
        package, _, kind = str(module.get("type", "")).rpartition(".")
        path = str(module.get("path") or "").strip("/")
        file = _MODULE_FILES.get(kind) if package.startswith("sentence_transformers.") else None
        if file is None or not path or f"{path}/{file}" in names:
            continue
        # Transformer and StaticEmbedding can be adapters, exports or older layouts: their folder is enough.
        if kind in ("Transformer", "StaticEmbedding") and any(name.startswith(f"{path}/") for name in names):
            continue
        raise IncompleteRepositoryError(
            f"{origin} has no {path}/{file}, which its modules.json requires for the module {kind}. Download or copy all "
            "of its files, sub-folders included."
        )


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return f"{', '.join(names[:_MAX_NAMES_SHOWN])}{more}"


def _read_json(path: Path, origin: str) -> object:
    try:
        content: object = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise IncompleteRepositoryError(
            f"{origin} has a {PurePosixPath(path).name} that cannot be read ({error}). Download it again."
        ) from error
    return content
