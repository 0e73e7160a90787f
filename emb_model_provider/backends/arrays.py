"""Turns batches into the padded arrays that a graph or pipeline reads, and the arrays that it returns into outputs.

Tokens that do not count are removed here, by their ids, and not in the graph: padding, special tokens, punctuation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.backends.base import (
    ATTENTION_MASK,
    INPUT_IDS,
    POOLING_MASK,
    SCORES,
    SENTENCE_EMBEDDING,
    TERM_WEIGHTS,
    TOKEN_TYPES,
    TOKEN_VECTORS,
    TOKEN_WEIGHTS,
    Outputs,
    SparseVector,
    TokenRules,
)
from emb_model_provider.errors import InferenceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription, TokenBatch

_NO_RULES = TokenRules()


def pad_inputs(
    batch: TokenBatch, rows: Sequence[int], length: int, description: ModelDescription
) -> dict[str, NDArray[np.int64]]:
    """Return the arrays of some inputs of a batch, padded to a length, by name: int64 of shape (rows, length)."""
    ids = np.full((len(rows), length), description.pad_token_id, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    spans = []
    for i, row in enumerate(rows):
        tokens = batch.ids[row]
        start = length - len(tokens) if description.padding_side == "left" else 0
        ids[i, start : start + len(tokens)] = tokens
        mask[i, start : start + len(tokens)] = 1
        spans.append((start, start + len(tokens)))
    arrays = {INPUT_IDS: ids, ATTENTION_MASK: mask}
    if description.excludes_prompt:
        arrays[POOLING_MASK] = mask.copy()
        for i, row in enumerate(rows):
            arrays[POOLING_MASK][i, spans[i][0] : spans[i][0] + batch.prompt_lengths[row]] = 0
    if description.has_token_types:
        arrays[TOKEN_TYPES] = np.zeros_like(ids)
        if batch.first_lengths is not None:
            for i, row in enumerate(rows):
                arrays[TOKEN_TYPES][i, spans[i][0] + batch.first_lengths[row] : spans[i][1]] = 1
    if batch.attended is not None:
        for i, row in enumerate(rows):
            mask[i, spans[i][0] + batch.attended[row] : spans[i][1]] = 0
    return arrays


class OutputBuilder:
    """Collects the outputs of a batch, whose parts are computed one after the other."""

    def __init__(self, batch: TokenBatch, description: ModelDescription) -> None:
        self._batch = batch
        self._rules = description.token_rules or _NO_RULES
        self._pads_left = description.padding_side == "left"
        names, count = batch.outputs or description.outputs, len(batch.ids)
        self._dense = np.empty((count, description.dimension), dtype=np.float32) if "dense" in names else None
        self._scores = np.empty((count, len(description.labels)), dtype=np.float32) if "scores" in names else None
        self._sparse: dict[int, SparseVector] | None = {} if "sparse" in names else None
        self._vectors: dict[int, NDArray[np.float32]] | None = {} if "multi_vector" in names else None

    def add(self, rows: Sequence[int], arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Add the results of some inputs.

        Args:
            rows: The inputs, by their places in the batch.
            arrays: By name: the arrays that were computed for these inputs, which need not be kept. Their tokens are
                padded to one length.
        """
        if self._dense is not None:
            self._dense[rows] = arrays[SENTENCE_EMBEDDING]
        if self._scores is not None:
            self._scores[rows] = arrays[SCORES]
        if self._sparse is not None:
            if TERM_WEIGHTS in arrays:
                for row, weights in zip(rows, arrays[TERM_WEIGHTS], strict=True):
                    self._sparse[row] = _nonzero(weights)
            else:
                for row, weights in zip(rows, arrays[TOKEN_WEIGHTS], strict=True):
                    self._sparse[row] = self._strongest(row, weights)
        if self._vectors is not None:
            for row, vectors in zip(rows, arrays[TOKEN_VECTORS], strict=True):
                self._vectors[row] = self._of_tokens(row, vectors)[self._counted(row)]

    def build(self) -> Outputs:
        """Return the outputs, after all inputs were added."""
        every = range(len(self._batch.ids))
        return Outputs(
            dense=self._dense,
            scores=self._scores,
            sparse=[self._sparse[row] for row in every] if self._sparse is not None else None,
            multi_vector=[self._vectors[row] for row in every] if self._vectors is not None else None,
        )

    def _of_tokens(self, row: int, padded: NDArray[np.float32]) -> NDArray[np.float32]:
        length = len(self._batch.ids[row])
        return padded[len(padded) - length :] if self._pads_left else padded[:length]

    def _counted(self, row: int) -> NDArray[np.bool_]:
        """Return which tokens of an input have a vector."""
        ids = np.asarray(self._batch.ids[row])
        task = self._batch.tasks[row] if self._batch.tasks is not None else None
        counted = np.ones(len(ids), dtype=np.bool_)
        if self._rules.skipped_ids and (task or "document") in self._rules.skipping_tasks:
            counted = ~np.isin(ids, self._rules.skipped_ids)
        if self._rules.skips_first:
            counted[0] = False
        return counted

    def _strongest(self, row: int, padded: NDArray[np.float32]) -> SparseVector:
        """Return the highest weight of each token id."""
        ids, places = np.unique(np.asarray(self._batch.ids[row], dtype=np.int32), return_inverse=True)
        weights = np.zeros(len(ids), dtype=np.float32)
        np.maximum.at(weights, places.reshape(-1), self._of_tokens(row, padded))
        weights[np.isin(ids, self._rules.unweighted_ids)] = 0
        vector = _nonzero(weights)
        return SparseVector(ids[vector.indices], vector.values)


def check_shapes(outputs: Outputs, batch: TokenBatch, description: ModelDescription) -> None:
    """Raise InferenceError if a backend did not return a row of the right size for each input and requested output."""
    count = len(batch.ids)
    widths = {"dense": description.dimension, "scores": len(description.labels)}
    for name in batch.outputs or description.outputs:
        rows = getattr(outputs, name)
        shape = None if rows is None else rows.shape if isinstance(rows, np.ndarray) else (len(rows),)
        expected = (count, widths[name]) if name in widths else (count,)
        if shape != expected:
            raise InferenceError(f"The model returned {name} results of shape {shape} instead of {expected}.")


def finite_rows(outputs: Outputs, count: int) -> NDArray[np.bool_]:
    """Return which inputs have finite values in all outputs: bool of shape (inputs,)."""
    finite = np.ones(count, dtype=np.bool_)
    for rows in (outputs.dense, outputs.scores):
        if rows is not None:
            finite &= np.isfinite(rows).all(axis=1)
    if outputs.sparse is not None:
        finite &= [bool(np.isfinite(vector.values).all()) for vector in outputs.sparse]
    if outputs.multi_vector is not None:
        finite &= [bool(np.isfinite(vectors).all()) for vectors in outputs.multi_vector]
    return finite


def _nonzero(weights: NDArray[np.float32]) -> SparseVector:
    # Values that are not finite are kept, so that the caller sees them.
    indices = np.flatnonzero(weights).astype(np.int32)
    return SparseVector(indices, weights[indices])
