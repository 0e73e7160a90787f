"""The backend of static embeddings: it looks the vectors of tokens up in a table, and averages them, without torch.

It serves directories of model2vec, and pipelines of sentence-transformers whose first module is a StaticEmbedding and whose
other modules only normalize. Other pipelines, such as one with a Dense module, are left to torch.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from emb_model_provider.backends.base import ModelDescription, Outputs, check_ids, check_lengths
from emb_model_provider.backends.memory_estimate import static_bytes
from emb_model_provider.backends.tokenizer_rules import without_padding
from emb_model_provider.errors import LoadError
from emb_model_provider.formatting import describe_error

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import TokenBatch
    from emb_model_provider.backends.pipeline_plan import PipelinePlan
    from emb_model_provider.backends.repository import Repository

_MAX_LENGTH = 1_000_000
"""Static embeddings have no positions, and their cost is linear, so the limit only bounds memory."""
_TABLE, _MODEL2VEC_TABLE, _MAPPING, _WEIGHTS = "embedding.weight", "embeddings", "mapping", "weights"
"""Names of tensors: the table of sentence-transformers and that of model2vec, which can have a row for each token (`mapping`)
and a factor for each token (`weights`)."""
_FLOATS = frozenset({"F16", "F32", "F64"})
_AT_ONCE = 1024
"""Vectors of tokens that are copied from the table and added up. The sum of a long text is the sum of those of its parts,
which rounding affects less: of 100,000 tokens, sentence-transformers is 1e-4 away from the exact mean, and this 1e-6."""
_SMALLEST_NORM = 1e-12


def table_file(repository: Repository, plan: PipelinePlan) -> Path | None:
    """Return the file with the table of a model that `StaticBackend` can serve, or None if torch must load it."""
    path = repository.files.get(f"{repository.folder}model.safetensors")
    kinds = [str(module.get("type", "")) for module in repository.route_modules]
    if (
        path is None
        or plan.kind != "dense"
        or plan.pooling is not None  # cannot be applied, which torch reports
        or f"{repository.folder}tokenizer.json" not in repository.files
        or not repository.is_static
        or not all(kind.startswith("sentence_transformers.") for kind in kinds)
        or not all(kind.endswith(".Normalize") for kind in kinds[1:])
    ):
        return None
    try:
        with safe_open(path, framework="np") as tensors:
            names = set(tensors.keys())
            table = _TABLE if _TABLE in names else _MODEL2VEC_TABLE
            others = [_MAPPING, _WEIGHTS] if table == _MODEL2VEC_TABLE else []
            dtypes = {name: tensors.get_slice(name).get_dtype() for name in (table, *others) if name in names}
    except (OSError, SafetensorError):
        return None  # torch reports it
    if dtypes.get(table) not in _FLOATS and not (dtypes.get(table) == "I8" and _WEIGHTS in dtypes):
        return None
    return path if dtypes.get(_WEIGHTS, "F32") in _FLOATS and dtypes.get(_MAPPING, "I64")[0] in "IU" else None


class StaticBackend:
    """A table of token vectors. Results are those of sentence-transformers at fp32."""

    streams = 1
    """Looking vectors up takes less time than tokenizing the texts."""

    def __init__(self, repository: Repository, plan: PipelinePlan, path: Path) -> None:
        """Load the table of `table_file`.

        Raises:
            LoadError: The table or the tokenizer cannot be read.
        """
        name = repository.name
        try:
            tokenizer = Tokenizer.from_file(str(repository.files[f"{repository.folder}tokenizer.json"]))
        except Exception as error:
            raise LoadError(
                f"{name}: tokenizer.json cannot be read ({describe_error(error)}). Download the model again, or correct the file."
            ) from error
        try:
            table = _read_table(path)
        except (OSError, SafetensorError, ValueError, LookupError) as error:
            raise LoadError(
                f"{name} cannot be loaded: the table of its token vectors is damaged or has an unexpected shape "
                f"({describe_error(error)}). Download the model again."
            ) from error
        # A zero vector for the token that replaces a text without tokens; see `describe_table`.
        self._table = np.zeros((len(table) + 1, table.shape[1]), dtype=table.dtype)
        self._table[:-1] = table
        normalizes = len(repository.route_modules) > 1
        # As `encode` of sentence-transformers, which truncates vectors after all modules.
        self._normalizes = normalizes and plan.truncate_dim is not None and plan.normalize is None
        self._width = min(table.shape[1], plan.truncate_dim or table.shape[1])
        smaller = plan.matryoshka
        if isinstance(smaller, tuple):
            smaller = tuple(size for size in smaller if 0 < size < self._width) or None
        self.description = ModelDescription(
            **describe_table(tokenizer, len(table), plan),
            dimension=self._width,
            normalize=(normalizes if plan.normalize is None else plan.normalize) and not self._normalizes,
            pooling="-",
            prompts=plan.prompts,
            default_prompt=plan.default_prompt,
            excludes_prompt=False,
            matryoshka=smaller,
            precision="fp32",
            device="cpu",
            backend="numpy",
            packs=True,
            notes=plan.notes,
        )
        self.memory_bytes = static_bytes(self._table.nbytes, self.description)

    def run(self, batch: TokenBatch) -> Outputs:
        check_lengths(batch, self.description.max_length)
        lengths = [len(row) for row in batch.ids]
        ids = np.fromiter(chain.from_iterable(batch.ids), dtype=np.int64, count=sum(lengths))
        check_ids(ids, len(self._table))
        vectors = np.empty((len(lengths), self._table.shape[1]), dtype=np.float32)
        start = 0
        # `np.add.reduceat` over the whole batch takes 3 to 25 times as long, because it adds up column by column.
        for vector, length in zip(vectors, lengths, strict=True):
            np.divide(self._sum(ids[start : start + length]), np.float32(length), out=vector)
            start += length
        if self._normalizes:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _SMALLEST_NORM)
        return Outputs(dense=np.ascontiguousarray(vectors[:, : self._width]))

    def run_fp32(self, batch: TokenBatch) -> Outputs:
        return self.run(batch)

    def close(self) -> None:
        self._table = self._table[:0]

    def _sum(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the sum of the vectors of tokens: fp32 of shape (width,)."""
        total: NDArray[np.float32] = np.add.reduce(self._table[ids[:_AT_ONCE]], axis=0, dtype=np.float32)
        for start in range(_AT_ONCE, len(ids), _AT_ONCE):
            total += np.add.reduce(self._table[ids[start : start + _AT_ONCE]], axis=0, dtype=np.float32)
        return total


def describe_table(tokenizer: Tokenizer, rows: int, plan: PipelinePlan) -> dict[str, Any]:
    """Return the values of a description that depend on the tokenizer and the number of rows of the table."""
    limit = (tokenizer.truncation or {}).get("max_length", _MAX_LENGTH)
    return {
        "vocab_size": rows,
        "tokenizer_json": without_padding(tokenizer.to_str(), post_processor=None),  # without special tokens
        # Not in the vocabulary: the backend adds a row of zeros, as the vector of a text without tokens.
        "pad_token_id": rows,
        "padding_side": "right",
        "max_length": min(limit, plan.max_length or _MAX_LENGTH),
    }


def _read_table(path: Path) -> NDArray[Any]:
    """Return the vector of each token id, at fp32 or fp16, like StaticEmbedding of sentence-transformers."""
    with safe_open(path, framework="np") as tensors:
        names = set(tensors.keys())
        if _TABLE in names:
            table: NDArray[Any] = tensors.get_tensor(_TABLE)
        else:
            table = tensors.get_tensor(_MODEL2VEC_TABLE)
            if _MAPPING in names:
                table = table[tensors.get_tensor(_MAPPING).astype(np.int64)]
            if _WEIGHTS in names:
                table = table.astype(np.promote_types(table.dtype, np.float32))
                table = (table * tensors.get_tensor(_WEIGHTS)[:, np.newaxis]).astype(table.dtype)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"its shape is {table.shape}")
    return table.astype(np.float32) if table.dtype == np.float64 else table
