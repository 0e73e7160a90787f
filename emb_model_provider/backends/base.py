"""What a backend is: token batch in, vectors out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

ComputePrecision = Literal["fp32", "fp16", "bf16", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near a backend's vectors come to those of the model at fp32, over texts of every kind.

    fp32 is sentence-transformers where the model is compiled, and the torch backend at fp32 where torch serves.
    """

    min_cosine: float
    mean_cosine: float
    texts: int
    """How many texts were compared."""
    top10_overlap: float | None = None
    """Share of each text's ten nearest neighbours among the texts that stay its ten nearest, 0 to 1, mean."""
    spearman: float | None = None
    """Rank correlation (Spearman's) of the similarities of all pairs of those texts, -1 to 1."""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """All that serving needs to know of a loaded model, whichever backend runs it."""

    dimension: int
    """Native size of a vector."""
    max_length: int
    """Longest input in tokens, special tokens included."""
    vocab_size: int
    """Token ids below this are valid."""
    tokenizer_json: str
    """A `tokenizers.Tokenizer` in its own JSON, without truncation and padding."""
    pad_token_id: int
    padding_side: Literal["left", "right"]
    normalize: bool
    """Whether the model's own vectors have length 1. A backend's `embed` leaves that last step out."""
    pooling: str
    """For people: how token vectors become one, e.g. `cls` or `mean`; `-` where the model has its own way."""
    prompts: Mapping[str, str]
    """Prompt name to the text put before an input."""
    default_prompt: str | None
    """Name of the prompt used when a request names none."""
    excludes_prompt: bool
    """Whether pooling leaves the prompt's tokens out."""
    matryoshka: tuple[int, ...] | Literal["any"] | None
    """Smaller sizes that the model declares its vectors can be cut to."""
    precision: ComputePrecision
    """What `auto` became."""
    device: str
    """What `auto` became: cpu, cuda:0, mps."""
    backend: Literal["openvino", "torch"]
    notes: tuple[str, ...] = ()
    """What an operator should know of how it was loaded, such as a guess that was made."""
    fidelity: Fidelity | None = None
    """As measured before the model was let serve; None where the backend is the reference itself (torch at fp32), or
    where it was not measured, which a note then says."""
    compute: ComputePrecision | None = None
    """What is multiplied with each other, where that is not `precision`: weights that are stored in int4 may be
    computed in bf16. int8 here means that activations, too, become integers as they come."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokenized inputs that are run together. Row i of the result belongs to `ids[i]`."""

    ids: Sequence[Sequence[int]]
    """Token ids of each input, special tokens included, none empty, none longer than `max_length`."""
    prompt_lengths: Sequence[int]
    """Tokens at the start of each input that are its prompt; read only where `excludes_prompt`."""

    def padded(
        self, pad_token_id: int, side: Literal["left", "right"]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ids and attention mask, each int64 of shape (inputs, longest input)."""
        import numpy as np  # only to run batches: whoever lists models needs what is above, and not this

        longest = max(len(row) for row in self.ids)
        ids = np.full((len(self.ids), longest), pad_token_id, dtype=np.int64)
        mask = np.zeros((len(self.ids), longest), dtype=np.int64)
        for i, row in enumerate(self.ids):
            span = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
            ids[i, span] = row
            mask[i, span] = 1
        return ids, mask


class Backend(Protocol):
    """A loaded model. One thread creates and closes it; `embed` is called from up to `streams` threads at a time."""

    description: ModelDescription
    streams: int
    """How many batches it runs side by side at best, 1 or more."""
    memory_bytes: int
    """What the model takes in memory, on its device where that has memory of its own; see `memory.py`."""

    def embed(self, batch: TokenBatch) -> NDArray[np.float32]:
        """Return float32 vectors of shape (inputs, dimension), before a final length normalization.

        The values may be non-finite where the model is at fault: the caller checks. Raises whatever the
        runtime raises; the backend stays usable.
        """
        ...

    def embed_fp32(self, batch: TokenBatch) -> NDArray[np.float32]:
        """Return the same vectors as `embed`, computed at fp32 however slow that is.

        For the rare batch whose vectors were not finite. Raises what `embed` raises, and NotImplementedError where
        the model cannot be computed at fp32.
        """
        ...

    def close(self) -> None:
        """Free the model's memory. The backend is not used again."""
        ...
