"""What an engine returns: the results of one request, with its measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emb_model_provider.backends.output_types import convert
from emb_model_provider.errors import ModelNotReadyError, RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from emb_model_provider.backends.base import Activation, SparseVector
    from emb_model_provider.backends.output_types import OutputType
    from emb_model_provider.serving.jobs import Timing

_COMPILED_RETRY_AFTER_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measurements of one request."""

    tokens: int
    """Tokens that were processed, after truncation, including special tokens."""
    truncated: int
    """Number of inputs, or of documents of a reranker, that were cut."""
    tokenize_s: float
    timing: Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings(Measured):
    """Embeddings of texts, in the order of the inputs."""

    input_tokens: Sequence[int]
    """Tokens of each input."""
    vectors: NDArray[np.float32]
    """Dense vectors: float32 of shape (inputs, dimensions), or (inputs, 0) if they were not requested."""
    value_range: float | None = None
    """The absolute value that becomes the largest integer; see `output_types.convert`. None: it was not measured."""
    is_interim: bool = False
    """Whether the model is being compiled, so that this range is measured soon."""
    sparse: Sequence[SparseVector] | None = None
    """Sparse vectors. None: they were not requested."""
    multi_vector: Sequence[NDArray[np.float32]] | None = None
    """For each input, the vectors of its tokens: float32 of shape (tokens, dimension). None: they were not requested."""

    @property
    def size(self) -> int:
        """Number of values of all vectors."""
        sparse = sum(len(vector.values) for vector in self.sparse or ())
        return self.vectors.size + sparse + sum(vectors.size for vectors in self.multi_vector or ())

    def as_type(self, kind: OutputType) -> NDArray[Any]:
        """Return the dense vectors with values of another type; see `output_types.convert`.

        Raises:
            RequestError: The ranges for integers were not measured.
            ModelNotReadyError: They are measured while the model is compiled.
        """
        if kind in ("int8", "uint8") and self.value_range is None and self.is_interim:
            raise ModelNotReadyError(
                f"This model is being compiled, and cannot return {kind} before that. Try again later, or request 'float', "
                "'float16', 'binary' or 'ubinary'.",
                retry_after_s=_COMPILED_RETRY_AFTER_S,
            )
        if kind in ("int8", "uint8") and self.value_range is None:
            raise RequestError(
                f"This model cannot return {kind}, because the range of its values was not measured "
                "(EMB_PROVIDER_MEASURE_FIDELITY=false). Request 'float', 'float16', 'binary' or 'ubinary', or ask the "
                "operator to enable it.",
                param="output_dtype",
            )
        return convert(self.vectors, kind, self.value_range or 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarities(Measured):
    """How similar texts are to one text, in the order of the texts."""

    values: NDArray[np.float32]
    """float32 of shape (texts,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores(Measured):
    """Scores of pairs, in the order of the pairs."""

    scores: NDArray[np.float32]
    """float32 of shape (pairs,)."""
    activation: Activation
    """What was applied to the logits; `identity` for raw scores."""


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """A document of a query."""

    index: int
    """Its place among the documents that were passed."""
    score: float
    document: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifications(Measured):
    """Scores of texts by label, in the order of the texts."""

    scores: NDArray[np.float32]
    """float32 of shape (texts, labels)."""
    labels: tuple[str, ...]
    activation: Activation
