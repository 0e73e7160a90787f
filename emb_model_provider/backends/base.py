"""The interface of backends, and the types that describe a loaded model."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from emb_model_provider.errors import InferenceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from emb_model_provider.model_spec import Kind

    Row: TypeAlias = "NDArray[np.float32] | SparseVector"
    """One output of one input."""
    InputKey = tuple[str | None, int, int, int, bytes]

ComputePrecision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
BackendKind = Literal["openvino", "torch", "numpy"]
"""What runs a model; numpy runs static embeddings only."""
OutputName = Literal["dense", "scores", "sparse", "multi_vector"]
"""An output of a model. A model has one or, as bge-m3, several."""
Task = Literal["embed", "rerank", "classify", "embed_sparse", "embed_multi_vector"]
"""What a request can ask a model for."""
Activation = Literal["sigmoid", "softmax", "identity"]

INPUT_IDS, ATTENTION_MASK, POOLING_MASK, TOKEN_TYPES = "input_ids", "attention_mask", "pooling_mask", "token_type_ids"
"""Names of the arrays that a graph reads, each int64 of shape (inputs, tokens). Only models that exclude prompts have a
pooling mask, and only models of pairs can have token types."""
SENTENCE_EMBEDDING, SCORES, TERM_WEIGHTS = "sentence_embedding", "scores", "term_weights"
TOKEN_WEIGHTS, TOKEN_VECTORS = "token_weights", "token_embeddings"
"""Names of the arrays that a graph or pipeline returns; see `ModelDescription.arrays`."""

_OUTPUTS: Mapping[str, OutputName] = {
    SENTENCE_EMBEDDING: "dense",
    SCORES: "scores",
    TERM_WEIGHTS: "sparse",
    TOKEN_WEIGHTS: "sparse",
    TOKEN_VECTORS: "multi_vector",
}
TASKS: Mapping[OutputName, Task] = {"dense": "embed", "sparse": "embed_sparse", "multi_vector": "embed_multi_vector"}
_ITEM_BYTES = 4
_TERM_BYTES = 8
_USUAL_TERMS = 256
"""Terms of a sparse vector, most often. Only estimates of memory use it."""


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
class ScoreFidelity:
    """How close the logits of pairs, or of the labels of texts, are to those at fp32."""

    pairs: int
    """Number of compared rows."""
    max_difference: float
    """Largest absolute difference of a logit."""
    relative_difference: float
    """Largest difference, relative to the spread of the logits of the same query (or label)."""
    spearman: float
    """Lowest rank correlation of the documents of a query (or the texts of a label), -1 to 1."""

    @property
    def agreement(self) -> float:
        return min(self.spearman, 1 - self.relative_difference)


@dataclass(frozen=True, slots=True)
class SparseFidelity:
    """How close sparse vectors are to those at fp32."""

    texts: int
    term_overlap: float
    """Mean share of the terms with the highest weights that are also those at fp32, 0 to 1."""
    score_error: float
    """Largest error of a dot product of two texts, relative to the norms of their vectors."""

    @property
    def agreement(self) -> float:
        return min(self.term_overlap, 1 - self.score_error)


@dataclass(frozen=True, slots=True)
class MultiVectorFidelity:
    """How close the vectors of tokens are to those at fp32."""

    texts: int
    min_cosine: float
    """Lowest cosine of the vector of a token."""
    maxsim_error: float
    """Largest difference of the MaxSim score of a query and a document, relative to that of the query with itself."""

    @property
    def agreement(self) -> float:
        return 1 - self.maxsim_error


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How close the results of a model are to those at fp32, over the probes and the corpus.

    The reference of a compiled model is sentence-transformers; that of the torch backend is itself at fp32. Values of
    outputs that the model does not have are None.
    """

    min_cosine: float | None
    """Of dense vectors; likewise the next three."""
    mean_cosine: float | None
    texts: int
    """Number of compared texts or pairs."""
    top10_overlap: float | None = None
    """Mean share of each text's ten nearest neighbors that are also its ten nearest at fp32, 0 to 1."""
    spearman: float | None = None
    """Spearman's rank correlation of the similarities of all pairs of those texts, -1 to 1."""
    calibration: Calibration | None = None
    """Measured with the same vectors. None: an earlier version measured."""
    scores: ScoreFidelity | None = None
    sparse: SparseFidelity | None = None
    multi_vector: MultiVectorFidelity | None = None

    @property
    def agreement(self) -> Mapping[OutputName, float]:
        """How close each output is to that at fp32, at most 1: the lowest cosine of dense vectors, or `agreement`."""
        values: dict[OutputName, float | None] = {
            "dense": self.min_cosine,
            "scores": self.scores.agreement if self.scores is not None else None,
            "sparse": self.sparse.agreement if self.sparse is not None else None,
            "multi_vector": self.multi_vector.agreement if self.multi_vector is not None else None,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class TokenRules:
    """Which tokens of a sparse or multi-vector model count, and what is added to its queries."""

    unweighted_ids: tuple[int, ...] = ()
    """Tokens that have no weight in sparse vectors, such as special tokens."""
    skipped_ids: tuple[int, ...] = ()
    """Tokens that have no vector, such as punctuation."""
    skipping_tasks: tuple[str, ...] = ("document",)
    """Tasks whose inputs these tokens are skipped in. Inputs without a task count as documents."""
    skips_first: bool = False
    """Whether the first token has no vector."""
    query_length: int | None = None
    """Longest query in tokens. None: as other inputs."""
    document_length: int | None = None
    expansion_id: int | None = None
    """Token that is added to queries, up to `expansion_length` tokens. None: none is added."""
    expansion_length: int = 0
    expansion_is_attended: bool = False
    """Whether the other tokens of the query attend to the added ones."""


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """A chat template: a query and a document become one text, which is tokenized as a whole."""

    before: str
    """Text before the query."""
    between: str
    after: str
    around_instruction: tuple[str, str] | None = None
    """The text before and after an instruction, in the place of `before`. None: the template has no instruction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Options of OpenVINO that are chosen by measurement. They change the speed of a model, and its results by rounding."""

    fused_attention: bool = True
    """Whether one kernel computes the attention of batches, which needs less memory."""
    fused_attention_alone: bool = True
    """The same for a request that is alone, and runs on all threads."""
    streams: int | None = None
    """Number of batches that run at the same time. None: see `stream_layout`."""
    int8_gain: float | None = None
    """How many times as fast the model is with quantized activations as without. None: not measured, or they are not
    quantized."""


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
    """Whether the model normalizes its vectors to length 1. `Backend.run` omits this last step."""
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
    backend: BackendKind
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
    activation_group: int | None = None
    """Values of an activation that share a scale when `compute` is int8. None: see `openvino_cpu.runtime`."""
    own_calibration: Calibration | None = None
    """The calibration of a model without fidelity."""
    tuning: Tuning = Tuning()
    """How OpenVINO runs the model on this processor."""
    is_interim: bool = False
    """Whether another backend takes over as soon as the model is compiled."""
    kind: Kind = "dense"
    arrays: tuple[str, ...] = (SENTENCE_EMBEDDING,)
    """Names of the arrays that the graph or pipeline returns, in order: `sentence_embedding`, shape (inputs, dimension);
    `scores`, the logits, (inputs, labels); `term_weights`, (inputs, vocabulary); `token_weights`, (inputs, tokens);
    `token_embeddings`, (inputs, tokens, dimension)."""
    has_token_types: bool = False
    """Whether the model distinguishes the tokens of the two texts of a pair; see `TokenBatch.first_lengths`."""
    labels: tuple[str, ...] = ()
    """Names of the columns of `scores`."""
    activation: Activation = "identity"
    """Turns logits into scores, outside the graph."""
    pair_template: PairTemplate | None = None
    """How a pair becomes a text. None: the tokenizer puts its special tokens between the two texts."""
    token_rules: TokenRules | None = None
    packs: bool = False
    """Whether batches have no padding, so that they cost their tokens, whatever the lengths of their inputs."""
    max_batch_tokens: int | None = None
    """Largest batch in tokens that fits into the memory that was free on the device after loading. None: not known."""

    @property
    def outputs(self) -> tuple[OutputName, ...]:
        """The outputs of the model, in the order of `arrays`."""
        return tuple(_OUTPUTS[name] for name in self.arrays)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What requests can ask the model for."""
        scores: Task = "rerank" if self.kind == "reranker" else "classify"
        return tuple(TASKS.get(name, scores) for name in self.outputs)

    def output_bytes(self, outputs: Sequence[OutputName], inputs: int, tokens: int) -> int:
        """Estimate the memory of results, for a number of inputs with a number of tokens in total."""
        sizes: dict[OutputName, int] = {
            "dense": inputs * self.dimension * _ITEM_BYTES,
            "scores": inputs * len(self.labels) * _ITEM_BYTES,
            "sparse": (tokens if TOKEN_WEIGHTS in self.arrays else inputs * _USUAL_TERMS) * _TERM_BYTES,
            "multi_vector": tokens * self.dimension * _ITEM_BYTES,
        }
        return sum(sizes[name] for name in outputs)

    @property
    def calibration(self) -> Calibration | None:
        """None if it was not measured, so that vectors of integers cannot be returned."""
        return self.fidelity.calibration if self.fidelity is not None else self.own_calibration


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Tokenized inputs that run together. Row i of the result belongs to `ids[i]`."""

    ids: Sequence[Sequence[int]]
    """Special tokens included. No input is empty."""
    prompt_lengths: Sequence[int]
    """Number of prompt tokens at the start of each input. Used only if the model excludes prompts."""
    tasks: Sequence[str | None] | None = None
    """The task of each input, `query` or `document`. It decides the route of an asymmetric model, and which tokens of a
    multi-vector model count. None: the default."""
    first_lengths: Sequence[int] | None = None
    """Number of tokens at the start of each input that belong to the first text of a pair; the others belong to the second
    one. Used only if the model has token types. None: the inputs are no pairs."""
    attended: Sequence[int] | None = None
    """Number of tokens at the start of each input that its other tokens attend to. The rest is a query expansion, whose
    tokens only have vectors. None: all."""
    outputs: tuple[OutputName, ...] | None = None
    """The outputs to return. None: all that the model has."""

    def key(self, row: int) -> InputKey:
        """Return a key that is equal for inputs with equal results."""
        return (
            self.tasks[row] if self.tasks is not None else None,
            self.prompt_lengths[row],
            self.first_lengths[row] if self.first_lengths is not None else -1,
            self.attended[row] if self.attended is not None else -1,
            array("I", self.ids[row]).tobytes(),
        )

    def select(self, rows: Sequence[int]) -> TokenBatch:
        """Return a batch of some of the inputs."""
        return TokenBatch.join([(self, row) for row in rows])

    @staticmethod
    def join(
        inputs: Sequence[tuple[TokenBatch, int]], outputs: Iterable[tuple[OutputName, ...]] | None = None
    ) -> TokenBatch:
        """Return a batch of inputs of several batches of one model.

        Args:
            inputs: The batches, and the places of the inputs in them.
            outputs: The batch requests all of these; None: what the first batch requests.
        """
        batches = list({id(batch): batch for batch, _ in inputs}.values())
        tasks = first_lengths = attended = None
        if any(batch.tasks is not None for batch in batches):
            tasks = [batch.tasks[row] if batch.tasks is not None else None for batch, row in inputs]
        if any(batch.first_lengths is not None for batch in batches):
            first_lengths = [(batch.first_lengths or _lengths(batch))[row] for batch, row in inputs]
        if any(batch.attended is not None for batch in batches):
            attended = [(batch.attended or _lengths(batch))[row] for batch, row in inputs]
        requested = batches[0].outputs
        if outputs is not None:
            requested = tuple(dict.fromkeys(name for names in outputs for name in names))
        return TokenBatch(
            ids=[batch.ids[row] for batch, row in inputs],
            prompt_lengths=[batch.prompt_lengths[row] for batch, row in inputs],
            tasks=tasks,
            first_lengths=first_lengths,
            attended=attended,
            outputs=requested,
        )


def _lengths(batch: TokenBatch) -> list[int]:
    return [len(row) for row in batch.ids]


@dataclass(frozen=True, slots=True, eq=False)
class SparseVector:
    """A sparse vector. Its indices ascend."""

    indices: NDArray[np.int32]
    """Token ids with a weight."""
    values: NDArray[np.float32]
    """Their weights, greater than 0."""

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.values.nbytes

    def copy(self) -> SparseVector:
        return SparseVector(self.indices.copy(), self.values.copy())

    def largest(self, count: int) -> SparseVector:
        """Return the vector with its `count` largest weights only."""
        import numpy as np  # here, because listing models needs the types of this module, but not numpy

        if len(self.values) <= count:
            return self
        kept = np.sort(np.argsort(-self.values, kind="stable")[:count])
        return SparseVector(self.indices[kept], self.values[kept])


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """The results of a batch: for each requested output, one row per input. Other outputs are None."""

    dense: NDArray[np.float32] | None = None
    """Shape (inputs, dimension), before a final length normalization."""
    scores: NDArray[np.float32] | None = None
    """Logits, shape (inputs, labels)."""
    sparse: Sequence[SparseVector] | None = None
    multi_vector: Sequence[NDArray[np.float32]] | None = None
    """Ragged rows: for each input shape (tokens, dimension), without the tokens that do not count."""

    @staticmethod
    def of_rows(names: Sequence[OutputName], rows: Sequence[tuple[Row, ...]]) -> Outputs:
        """Return results that consist of these rows: for each input, the named outputs in this order."""
        import numpy as np  # as above

        columns: dict[str, Any] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        for name in ("dense", "scores"):
            if name in columns:
                columns[name] = np.concatenate(columns[name]).reshape(len(rows), -1)
        return Outputs(**columns)

    def row(self, index: int, names: Sequence[OutputName]) -> tuple[Row, ...]:
        """Return the named outputs of an input."""
        return tuple(getattr(self, name)[index] for name in names)


class Backend(Protocol):
    """A loaded model. One thread creates and closes it; up to `streams` threads call `run` at the same time."""

    description: ModelDescription
    streams: int
    """Number of batches to run at the same time, 1 or more."""
    memory_bytes: int
    """Estimated memory of the model, on its device if that has its own memory; see `memory_estimate`."""

    def run(self, batch: TokenBatch) -> Outputs:
        """Return the requested outputs of a batch.

        Values may be non-finite; the caller checks. It raises whatever the runtime raises, and the backend remains
        usable.

        Raises:
            InferenceError: An input is longer than the model supports, or has an id that the model does not have.
        """
        ...

    def run_fp32(self, batch: TokenBatch) -> Outputs:
        """Return the same outputs as `run`, computed at fp32, which may be slow.

        For the rare batch whose results were not finite.

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
