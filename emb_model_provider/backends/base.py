"""The interface of backends, and the types that describe a loaded model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from emb_model_provider.errors import InferenceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

ComputePrecision = Literal["fp32", "fp16", "bf16", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Ranges of a model for vectors of integers, and what each type of values costs; see `output_types`."""

    spread: float
    """Largest absolute value of a vector of length 1 that integers represent, times the square root of its size."""
    unscaled_range: float
    """Largest absolute value that integers represent of a vector that is not normalized."""
    top10_overlap: Mapping[str, float]
    """By type: mean share of each text's ten nearest neighbors, among float vectors, that are also its ten nearest among
    vectors of this type. Those of bits are compared by their Hamming distance, the others by their cosine."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How close the vectors of a model are to those at fp32, over the probes and the corpus.

    The reference of a compiled model is sentence-transformers; that of the torch backend is itself at fp32.
    """

    min_cosine: float
    mean_cosine: float
    texts: int
    top10_overlap: float | None = None
    """Mean share of each text's ten nearest neighbors that are also its ten nearest at fp32, 0 to 1."""
    spearman: float | None = None
    """Spearman's rank correlation of the similarities of all pairs of those texts, -1 to 1."""
    calibration: Calibration | None = None
    """Measured with the same vectors. None: an earlier version measured."""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Everything that serving needs to know about a loaded model, independent of the backend."""

    dimension: int
    """Native size of a vector."""
    max_length: int
    """Longest input in tokens, special tokens included."""
    vocab_size: int
    """Token ids below this are valid."""
    tokenizer_json: str
    """A `tokenizers.Tokenizer` as JSON, without truncation and padding."""
    pad_token_id: int
    padding_side: Literal["left", "right"]
    normalize: bool
    """Whether the model normalizes its vectors to length 1. `Backend.embed` omits this last step."""
    pooling: str
    """How token vectors become one, such as `cls` or `mean`; `-` if the model has no pooling module. For display."""
    prompts: Mapping[str, str]
    """Prompt name to the text that is put before an input."""
    default_prompt: str | None
    """Name of the prompt for requests that name none."""
    excludes_prompt: bool
    matryoshka: tuple[int, ...] | Literal["any"] | None
    """Smaller sizes to which, as the model declares, its vectors can be truncated."""
    precision: ComputePrecision
    device: str
    """The device in use: cpu, cuda:N or mps; never `auto`."""
    backend: Literal["openvino", "torch"]
    notes: tuple[str, ...] = ()
    """How it was loaded, for the operator, such as a guess about its pipeline."""
    truncation_side: Literal["left", "right"] = "right"
    """The end at which the model is meant to be given inputs that are too long, unless a request chooses one."""
    routes: Mapping[str, ModelDescription] = field(default_factory=dict)
    """Of an asymmetric model: the description of the route of each task, such as `query` and `document`. Then the other
    values are those of the default route."""
    default_route: str | None = None
    """The task of requests that name none. None: an asymmetric model requires one."""
    fidelity: Fidelity | None = None
    """Measured before the model is served. None if the backend is the reference (torch at fp32), or if it was not
    measured, which a note then says."""
    compute: ComputePrecision | None = None
    """Precision of the computation if it differs from `precision`: weights that are stored in int4 may be computed in
    bf16. int8 means that activations are quantized, too, during inference."""
    own_calibration: Calibration | None = None
    """The calibration of a model without fidelity."""
    is_interim: bool = False
    """Whether another backend takes over as soon as the model is compiled."""

    @property
    def calibration(self) -> Calibration | None:
        """None if it was not measured, so that vectors of integers cannot be returned."""
        return self.fidelity.calibration if self.fidelity is not None else self.own_calibration


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokenized inputs that run together. Row i of the result belongs to `ids[i]`."""

    ids: Sequence[Sequence[int]]
    """Special tokens included. No input is empty."""
    prompt_lengths: Sequence[int]
    """Number of prompt tokens at the start of each input. Used only if the model excludes prompts."""
    tasks: Sequence[str] | None = None
    """Of an asymmetric model: the task of each input, which decides its route. None: the default route."""


class Backend(Protocol):
    """A loaded model. One thread creates and closes it; up to `streams` threads call `embed` at the same time."""

    description: ModelDescription
    streams: int
    """Number of batches to run at the same time, 1 or more."""
    memory_bytes: int
    """Estimated memory of the model, on its device if that has its own memory; see `memory_estimate`."""

    def embed(self, batch: TokenBatch) -> NDArray[np.float32]:
        """Return float32 vectors of shape (inputs, dimension), before a final length normalization.

        Values may be non-finite; the caller checks. It raises whatever the runtime raises, and the backend remains
        usable.

        Raises:
            InferenceError: An input is longer than the model supports, or has an id that the model does not have.
        """
        ...

    def embed_fp32(self, batch: TokenBatch) -> NDArray[np.float32]:
        """Return the same vectors as `embed`, computed at fp32, which may be slow.

        For the rare batch whose vectors were not finite.

        Raises:
            NotImplementedError: The model cannot be computed at fp32.
        """
        ...

    def close(self) -> None:
        """Free the memory of the model. The backend cannot be used afterwards."""
        ...


def check_lengths(batch: TokenBatch, max_length: int) -> None:
    """Raise InferenceError if an input is longer than the model supports."""
    longest = max(map(len, batch.ids))
    if longest > max_length:
        raise InferenceError(f"An input has {longest} tokens; the model supports {max_length}.")


def check_ids(ids: NDArray[np.int64], vocab_size: int) -> None:
    """Raise InferenceError if the model has no such id, because it would read beyond its tables."""
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InferenceError(f"An input has the token id {wrong}; the model has 0 to {vocab_size - 1}.")


def pad(
    rows: Sequence[Sequence[int]], length: int, pad_token_id: int, side: Literal["left", "right"]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ids and attention mask, each int64 of shape (rows, length)."""
    import numpy as np  # here, because listing models needs the types of this module, but not numpy

    ids = np.full((len(rows), length), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        span = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, span] = row
        mask[i, span] = 1
    return ids, mask
