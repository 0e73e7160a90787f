"""Names of weight files: which ones the libraries read, and what a repository without such files is."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OPENVINO_EXPORTS = ("openvino/openvino_model.xml", "openvino_model.xml")
ONNX_EXPORTS = ("model.onnx", "onnx/model.onnx")

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_VARIANT = re.compile(r"(?:model|pytorch_model)\.(?P<variant>\w+)\.(?:safetensors|bin)")
_SHARDED_VARIANT = re.compile(
    r"(?:model|pytorch_model)(?:\.\w+-\d+-of-\d+|-\d+-of-\d+\.\w+)\.(?:safetensors|bin)"
    r"|(?:model\.safetensors|pytorch_model\.bin)\.(?:index\.\w+|\w+\.index)\.json"
)
_PRECISIONS = ("fp32", "float32", "fp16", "float16", "bf16", "bfloat16")
"""Variants that can be loaded in place of plain weights, the most accurate first."""
_LATER_MODULE = re.compile(r"[1-9]\d*_\w+/")
"""A folder of sentence-transformers for a module after the transformer, such as `2_Dense/`."""
_LESS_ACCURATE = (re.compile(r"fp16|bf16|_o4\b"), re.compile(r"quant|int8|int4|q4|q8|bnb"))
"""Words in the names of ONNX files at a lower precision, worse ones later."""


def split_path(path: str) -> tuple[str, str]:
    """Return the directory of a path, with its slash ("" at the top), and its name."""
    parent, slash, name = path.rpartition("/")
    return f"{parent}{slash}", name


def is_weights(path: str) -> bool:
    """Return whether a file has weights for torch, at any precision. Those of an adapter do not count."""
    name = split_path(path)[1]
    return name not in ADAPTER_WEIGHTS and any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)


def is_variant(name: str) -> bool:
    """Return whether a name is that of weights at another precision, such as `model.fp16.safetensors`, or of their index."""
    return _VARIANT.fullmatch(name) is not None or _SHARDED_VARIANT.fullmatch(name) is not None


def best_variant(names: Iterable[str]) -> str | None:
    """Return the most accurate of the weights at another precision, or None if there are none in one file."""
    ranked = [
        (_PRECISIONS.index(match["variant"]), name.endswith(".bin"), name)
        for name in names
        if (match := _VARIANT.fullmatch(name)) is not None and match["variant"] in _PRECISIONS
    ]
    return min(ranked)[2] if ranked else None


def has_transformer_weights(paths: Iterable[str]) -> bool:
    """Return whether there are weights of a whole model, and not only those of a module after the transformer."""
    return any(is_weights(path) and _LATER_MODULE.match(path) is None for path in paths)


def is_adapter(paths: Collection[str]) -> bool:
    """Return whether a repository is an adapter, which needs a base model, and no whole model."""
    has_adapter = ADAPTER_CONFIG in paths and any(name in paths for name in ADAPTER_WEIGHTS)
    return has_adapter and not any(is_weights(path) and "/" not in path for path in paths)


def find_export(paths: Collection[str]) -> str | None:
    """Return the ONNX file, or the `.xml` of OpenVINO, that a repository without weights consists of.

    Of several ONNX files it is the one with the usual name, else the only one of the highest precision.
    """
    if has_transformer_weights(paths) or is_adapter(paths):
        return None
    for export in (*ONNX_EXPORTS, *OPENVINO_EXPORTS):
        if export in paths and not missing_weights_of(export, paths):
            return export
    by_rank: dict[int, list[str]] = {}
    for path in paths:
        if path.endswith(".onnx"):
            by_rank.setdefault(_inaccuracy(path), []).append(path)
    best = by_rank[min(by_rank)] if by_rank else []
    return best[0] if len(best) == 1 else None


def companions_of(export: str, paths: Iterable[str]) -> list[str]:
    """Return the files next to an export that contain its weights."""
    stem = export.rpartition(".")[0]
    if export.endswith(".xml"):
        pattern = re.compile(re.escape(f"{stem}.bin"))
    else:
        # onnx writes any name that its caller chooses: these are the ones in use.
        pattern = re.compile(rf"{re.escape(export)}(?:_data(?:_\d+)?|\.data)|{re.escape(stem)}\.(?:data|bin|weights)")
    return sorted(path for path in paths if pattern.fullmatch(path))


def missing_weights_of(export: str, paths: Iterable[str]) -> bool:
    """Return whether an export of OpenVINO has no weights. ONNX files can contain them."""
    return export.endswith(".xml") and not companions_of(export, paths)


def _inaccuracy(path: str) -> int:
    name = split_path(path)[1].lower()
    return max((rank for rank, pattern in enumerate(_LESS_ACCURATE, 1) if pattern.search(name)), default=0)
