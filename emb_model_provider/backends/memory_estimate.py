"""What a model takes in memory: reckoned from its weights, and compared with what processes grew by.

A figure is what the process, or the model's device where that has memory of its own, grows by once the model has
answered requests of many lengths: what counts towards a limit, not what it takes the moment it is loaded. It is
reckoned, not measured, since growth that is measured in a service is also that of its other models. Compared on two
cores of a Zen 4, each model alone in a process of its own: how much more was resident after batches of all lengths up
to 250 or 500 tokens, 512 tokens each at most, than after the model was unloaded again. Those of 107 million parameters
and more had random weights, and the graphs among them no tokenizer; a second load of BERT base came within 2 %:

                                                   reckoned    resident memory grew by
    openvino  22 M parameters, fp32                 307 MiB    293 MiB (350 over a process that had loaded none yet)
              22 M, bf16                            184        162 (243)
              108 M (BERT base), fp32              1,484      1,435
              108 M, bf16                            630        605
              333 M (BERT large), bf16             1,886      1,908
              107 M, 96 M of them a table, bf16      344        119: a table's rows are read when they are needed
              22 M, int8 computed in bf16            203        266 (330)
    torch     22 M, fp32                             115        102
              110 M, fp32                            446        440
              110 M, bf16                            237        191 to 220

The process itself, before any model, is not in it: some 100 MiB with openvino, and several hundred more once torch is
imported. Nor is what stays when models come and go: of a small one, ten times left 75 MiB with the allocator, in pieces,
and four more times nothing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from emb_model_provider.backends.base import ComputePrecision, ModelDescription
    from emb_model_provider.model_spec import Precision

_MIB = 2**20
_OPENVINO_WORKING, _TORCH_WORKING = 96 * _MIB, 22 * _MIB
"""Activations and kernels: hardly more for a large model, since batches are bounded by their tokens, and no more for
four lanes than for two."""
_PACKED_COPIES: dict[str, int] = {"fp32": 3}
_USUAL_COPIES = 2
"""Matrices are rearranged for the kernels that use them, short and long batches each have theirs: so OpenVINO comes to
hold several copies beside the file, which is mapped."""
_USUAL_GROWTH = 3
"""Times the size of a compiled model on the disk, which all of the table but the one of the large table come near to."""
_ITEM_BYTES: dict[ComputePrecision, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "int4": 1}
_UNIGRAM_ENTRY_BYTES, _ENTRY_BYTES = 900, 130
"""Of a tokenizer: 212 MB for 250,000 entries of a Unigram one; 3.3 MB for 30,000 WordPiece, 19 MB for 150,000 BPE ones."""
_MINIMUM_SHARES: dict[Precision, float] = {"fp32": 1.0, "int8": 0.25, "int4": 0.125}
"""Of a model's files, which may hold fp32, what torch holds at least."""


def openvino_bytes(
    stored: int, matrix_items: int, unpacked: int, computes: ComputePrecision, description: ModelDescription
) -> int:
    """Return what a compiled graph takes in memory.

    `stored` is the size of its weights' file in bytes, `matrix_items` how many numbers its matrices hold, `unpacked` how
    many bytes of them were made anew when it was loaded.
    """
    copies = _PACKED_COPIES.get(computes, _USUAL_COPIES) * matrix_items * _ITEM_BYTES[computes]
    return stored + unpacked + copies + _OPENVINO_WORKING + _tokenizer_bytes(description)


def torch_bytes(held: int, description: ModelDescription) -> int:
    """Return what a pipeline takes in memory whose parameters and buffers are `held` bytes."""
    # sentence-transformers holds a tokenizer of its own.
    return held + _TORCH_WORKING + 2 * _tokenizer_bytes(description)


def minimum_bytes(backend: Literal["openvino", "torch"], size: int, precision: Precision) -> int:
    """Return what a model takes at least, as far as can be told before it is loaded from files of `size` bytes."""
    if backend == "openvino":
        return size
    return int(size * _MINIMUM_SHARES.get(precision, 0.5))


def expected_bytes(backend: Literal["openvino", "torch"], size: int, precision: Precision) -> int:
    """Return what a model will take, as near as can be told before it is loaded from files of `size` bytes."""
    if backend == "openvino":
        return _USUAL_GROWTH * size + _OPENVINO_WORKING
    return minimum_bytes(backend, size, precision) + _TORCH_WORKING


def _tokenizer_bytes(description: ModelDescription) -> int:
    unigram = re.search(r'"type"\s*:\s*"Unigram"', description.tokenizer_json) is not None
    return description.vocab_size * (_UNIGRAM_ENTRY_BYTES if unigram else _ENTRY_BYTES)
