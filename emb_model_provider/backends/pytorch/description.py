"""Describes a loaded pipeline: its tokenizer as transformers uses it, and its limits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import torch
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from transformers import PreTrainedTokenizerFast

from emb_model_provider.backends.base import ModelDescription
from emb_model_provider.backends.pipeline_plan import MODELSCOPE_MAX_LENGTH
from emb_model_provider.backends.pytorch.pipeline import embedding_dimension, strip_final_normalize, word_table
from emb_model_provider.errors import LoadError, UnsupportedModelError
from emb_model_provider.formatting import describe_error

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from emb_model_provider.backends.base import ComputePrecision
    from emb_model_provider.backends.pipeline_plan import PipelinePlan

_NO_LIMIT = 10**9
"""transformers uses 1e30 for tokenizers without a maximum length."""
_FALLBACK_MAX_LENGTH = 512
"""For models without any limit (those with relative positions, such as T5), which are trained on this length."""
_STATIC_MAX_LENGTH = 1_000_000
"""Static embeddings have no positions, and their cost is linear, so the limit only bounds memory."""


def describe(
    pipeline: SentenceTransformer,
    plan: PipelinePlan,
    name: str,
    *,
    precision: ComputePrecision,
    device: str,
    backend: Literal["torch", "openvino"],
) -> ModelDescription:
    """Remove the final normalization of a loaded pipeline in place, run one token through it, and describe it.

    Raises:
        LoadError: The pipeline cannot embed, or its tokenizer cannot be used outside transformers. The message begins
            with `name`.
    """
    normalize = strip_final_normalize(pipeline, plan)
    if not isinstance(pipeline[0], StaticEmbedding):
        _fast_tokenizer(pipeline, name)  # what other modules read cannot be embedded
    try:
        dimension = embedding_dimension(pipeline)
    except Exception as error:
        raise LoadError(f"{name} was loaded but cannot embed: {describe_error(error)}") from error
    first: Any = pipeline[0]
    notes = list(plan.notes)
    poolings = [module for module in pipeline if isinstance(module, Pooling)]
    side: Literal["left", "right"] = "right"
    truncation_side: Literal["left", "right"] = "right"
    if isinstance(first, StaticEmbedding):
        vocab_size = first.num_embeddings
        tokenizer_json = _portable(first.tokenizer.to_str(), post_processor=None)  # without special tokens
        # Not in the vocabulary: the backend adds a row of zeros, as the vector of a text without tokens.
        pad_token_id = vocab_size
        limit = (first.tokenizer.truncation or {}).get("max_length", _STATIC_MAX_LENGTH)
        max_length = min(limit, plan.max_length or _STATIC_MAX_LENGTH)
    else:
        tokenizer = _fast_tokenizer(pipeline, name)
        tokenizer_json = _portable(tokenizer.backend_tokenizer.to_str())
        vocab_size = _embedding_rows(pipeline, len(tokenizer))
        pad_token_id = _pad_token_id(tokenizer, pipeline, vocab_size)
        side = "left" if tokenizer.padding_side == "left" else "right"
        max_length = _max_length(pipeline, tokenizer, plan, notes)
        truncation_side = "left" if tokenizer.truncation_side == "left" else "right"
        if getattr(tokenizer, "chat_template", None):
            notes.append("the tokenizer has a chat template, which is not used: inputs are embedded as plain text")
        highest = max(tokenizer.get_vocab().values(), default=0)
        if highest >= vocab_size:
            notes.append(
                f"the tokenizer has ids up to {highest}, but the model has only {vocab_size}: an input with a higher id "
                "is answered with an error"
            )
    return ModelDescription(
        dimension=dimension,
        max_length=max_length,
        vocab_size=vocab_size,
        tokenizer_json=tokenizer_json,
        pad_token_id=pad_token_id,
        padding_side=side,
        normalize=normalize,
        pooling="+".join(_mode(pooling) for pooling in poolings) or "-",
        prompts=dict(plan.prompts),
        default_prompt=plan.default_prompt,
        excludes_prompt=any(not pooling.include_prompt for pooling in poolings),
        matryoshka=_smaller_than(dimension, plan.matryoshka),
        precision=precision,
        device=device,
        backend=backend,
        truncation_side=truncation_side,
        notes=tuple(notes),
    )


def _mode(pooling: Pooling) -> str:
    return pooling.pooling_mode if isinstance(pooling.pooling_mode, str) else "+".join(pooling.pooling_mode)


def _smaller_than(
    dimension: int, sizes: tuple[int, ...] | Literal["any"] | None
) -> tuple[int, ...] | Literal["any"] | None:
    if sizes is None or sizes == "any":
        return sizes
    return tuple(size for size in sizes if 0 < size < dimension) or None


def _fast_tokenizer(pipeline: SentenceTransformer, name: str) -> PreTrainedTokenizerFast:
    tokenizer = getattr(pipeline[0], "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModelError(
            f"{name} has its own tokenizer ({type(tokenizer).__name__}) without a fast version "
            "(tokenizer.json), which is not supported."
        )
    if getattr(tokenizer, "split_special_tokens", False):
        raise UnsupportedModelError(
            f"{name} splits special tokens in texts (split_special_tokens), which is not supported."
        )
    if any(tokenizer("a", return_token_type_ids=True)["token_type_ids"]):
        raise UnsupportedModelError(
            f"{name} gives the tokens of a single text different types (token_type_ids), which is not supported."
        )
    return tokenizer


def _portable(tokenizer_json: str, **changes: object) -> str:
    """Remove truncation and padding, which depend on the request and on the batch."""
    contents = {**json.loads(tokenizer_json), "truncation": None, "padding": None, **changes}
    return json.dumps(contents, ensure_ascii=False)


def _embedding_rows(pipeline: SentenceTransformer, tokens: int) -> int:
    rows = getattr(word_table(pipeline), "num_embeddings", None)
    return int(rows or getattr(pipeline.config, "vocab_size", None) or tokens)


def _pad_token_id(tokenizer: PreTrainedTokenizerFast, pipeline: SentenceTransformer, vocab_size: int) -> int:
    # If there is none, any id can be used, because the attention mask hides it.
    for candidate in (tokenizer.pad_token_id, getattr(pipeline.config, "pad_token_id", None), tokenizer.eos_token_id):
        if isinstance(candidate, int) and 0 <= candidate < vocab_size:
            return candidate
    return 0


def _max_length(
    pipeline: SentenceTransformer, tokenizer: PreTrainedTokenizerFast, plan: PipelinePlan, notes: list[str]
) -> int:
    """Return the longest input in tokens: that of the settings or the tokenizer, within the positions of the model."""
    settings = getattr(pipeline[0], "processing_kwargs", None) or {}
    length = settings.get("text", {}).get("max_length") or tokenizer.model_max_length
    declared = int(length) if length is not None and 0 < length < _NO_LIMIT else None
    positions = _positions(pipeline)
    if plan.layout == "modelscope":
        # Like ModelScope, which reads the configuration of the model and not that of the tokenizer.
        declared = None
    wanted = plan.max_length or declared
    if wanted is None:
        if positions is None:
            notes.append(
                f"neither the tokenizer nor the model declares a maximum length: {_FALLBACK_MAX_LENGTH} tokens are "
                'used. Set the key "max_length" of this model in EMB_PROVIDER_MODEL_MAPPING to change this'
            )
        return positions or _FALLBACK_MAX_LENGTH
    if positions is None or wanted <= positions:
        return wanted
    if wanted != MODELSCOPE_MAX_LENGTH or plan.layout != "modelscope":
        notes.append(f"max length {wanted} exceeds the model's {positions} positions: {positions} is used")
    return positions


def _positions(pipeline: SentenceTransformer) -> int | None:
    """Return the number of positions of the model, or None if it has no limit."""
    model = pipeline.transformers_model
    if model is None:
        return None
    limits = []
    declared = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(declared, int) and declared > 0:
        limits.append(declared)
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        padding = getattr(module, "padding_idx", None)
        if isinstance(table, torch.nn.Embedding) and isinstance(padding, int):
            # The RoBERTa family counts positions from padding_idx + 1, so the first rows are not used.
            limits.append(table.num_embeddings - padding - 1)
    return min(limits, default=None)
