"""Describes a loaded pipeline: its tokenizer as transformers uses it, and its limits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from transformers import PreTrainedTokenizerFast

from emb_model_provider.backends.base import TOKEN_WEIGHTS, ModelDescription, PairTemplate, TokenRules
from emb_model_provider.backends.pipeline_plan import MODELSCOPE_MAX_LENGTH
from emb_model_provider.backends.pytorch.heads import label_count
from emb_model_provider.backends.pytorch.pipeline import array_widths, word_table
from emb_model_provider.backends.static import describe_table
from emb_model_provider.backends.tokenizer_rules import without_padding
from emb_model_provider.errors import LoadError, UnsupportedModelError
from emb_model_provider.formatting import describe_error

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

    from emb_model_provider.backends.base import Activation, ComputePrecision
    from emb_model_provider.backends.pipeline_plan import PipelinePlan
    from emb_model_provider.backends.pytorch.heads import Served
    from emb_model_provider.model_spec import Kind

_NO_LIMIT = 10**9
"""transformers uses 1e30 for tokenizers without a maximum length."""
_FALLBACK_MAX_LENGTH = 512
"""For models without any limit (those with relative positions, such as T5), which are trained on this length."""

_QUERY, _DOCUMENT, _INSTRUCTION = "QUERY-5f0c", "DOCUMENT-5f0c", "INSTRUCTION-5f0c"
"""Texts that no chat template contains."""


def describe(
    pipeline: BaseModel,
    served: Served,
    plan: PipelinePlan,
    name: str,
    *,
    precision: ComputePrecision,
    device: str,
    backend: Literal["torch", "openvino"],
) -> ModelDescription:
    """Run some tokens through a pipeline, and describe it.

    Args:
        pipeline: As it was loaded.
        served: As it is served.
        plan: Its plan.
        name: Of its repository, with which messages begin.
        precision: See `ModelDescription`; likewise the others.
        device: Likewise.
        backend: Likewise.

    Raises:
        LoadError: The pipeline cannot be run, or its tokenizer cannot be used outside transformers.
    """
    is_static = isinstance(pipeline[0], StaticEmbedding)
    if not is_static:
        _fast_tokenizer(pipeline, plan.kind, name)  # what other modules read is not supported
    try:
        widths = array_widths(served.pipeline, served.arrays)
    except Exception as error:
        raise LoadError(f"{name} was loaded but cannot run: {describe_error(error)}") from error
    notes = list(plan.notes)
    dimension = widths[served.arrays[0]]
    if is_static:
        static: Any = pipeline[0]
        description = describe_table(static.tokenizer, static.num_embeddings, plan)
    else:
        description = _describe_tokenizer(pipeline, plan, name, notes)
    if served.arrays == (TOKEN_WEIGHTS,):
        dimension = int(description["vocab_size"])
    poolings = [module for module in pipeline if isinstance(module, Pooling)]
    prompts = {key: text for key, text in pipeline.prompts.items() if text} if plan.kind == "multi-vector" else {}
    return ModelDescription(
        **description,
        dimension=dimension,
        normalize=served.normalize,
        pooling="+".join(_mode(pooling) for pooling in poolings) or "-",
        prompts={**prompts, **plan.prompts} if plan.kind != "multi-vector" else prompts,
        default_prompt=plan.default_prompt,
        excludes_prompt=any(not pooling.include_prompt for pooling in poolings),
        matryoshka=_smaller_than(dimension, plan.matryoshka),
        precision=precision,
        device=device,
        backend=backend,
        notes=tuple(notes),
        kind=plan.kind,
        arrays=served.arrays,
        has_token_types=served.has_token_types,
        token_rules=_token_rules(pipeline, plan, name),
        **(_describe_scores(pipeline, plan, name) if plan.kind in ("reranker", "classifier") else {}),
    )


def _describe_tokenizer(pipeline: BaseModel, plan: PipelinePlan, name: str, notes: list[str]) -> dict[str, Any]:
    tokenizer = _fast_tokenizer(pipeline, plan.kind, name)
    # sentence-transformers adds no special tokens for weights of tokens.
    changes = {"post_processor": None} if isinstance(pipeline[0], SparseStaticEmbedding) else {}
    vocab_size = _embedding_rows(pipeline, len(tokenizer))
    if getattr(tokenizer, "chat_template", None) and not _renders_messages(pipeline):
        notes.append("the tokenizer has a chat template, which is not used: inputs are read as plain text")
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocab_size:
        notes.append(
            f"the tokenizer has ids up to {highest}, but the model has only {vocab_size}: an input with a higher id "
            "is answered with an error"
        )
    return {
        "vocab_size": vocab_size,
        "tokenizer_json": without_padding(tokenizer.backend_tokenizer.to_str(), **changes),
        "pad_token_id": _pad_token_id(tokenizer, pipeline, vocab_size),
        "padding_side": "left" if tokenizer.padding_side == "left" else "right",
        "max_length": _max_length(pipeline, tokenizer, plan, notes),
        "truncation_side": "left" if tokenizer.truncation_side == "left" else "right",
    }


def _describe_scores(pipeline: BaseModel, plan: PipelinePlan, name: str) -> dict[str, Any]:
    count = label_count(pipeline)
    if plan.kind == "reranker" and count != 1:
        raise UnsupportedModelError(f"{name} has {count} labels, and a reranker has one. Serve it as a classifier.")
    config: Any = pipeline.config
    names = getattr(config, "id2label", None) or {}
    labels = tuple(str(names.get(index, index)) for index in range(count))
    return {
        "labels": labels,
        "activation": _activation(pipeline, plan, name),
        "pair_template": _pair_template(pipeline[0], plan, name) if _renders_messages(pipeline) else None,
    }


def _activation(pipeline: BaseModel, plan: PipelinePlan, name: str) -> Activation:
    if plan.kind == "classifier":
        # As in the pipeline for text classification of transformers.
        several = getattr(pipeline.config, "problem_type", None) == "multi_label_classification"
        return "sigmoid" if several else "softmax"
    function = getattr(pipeline, "activation_fn", None)
    if isinstance(function, torch.nn.Sigmoid):
        return "sigmoid"
    if function is None or isinstance(function, torch.nn.Identity):
        return "identity"
    raise UnsupportedModelError(
        f"{name} applies {type(function).__name__} to its scores, which is not supported (supported: Sigmoid, Identity)."
    )


def _renders_messages(pipeline: BaseModel) -> bool:
    """Return whether sentence-transformers renders the inputs of a pipeline with a chat template."""
    return "message" in getattr(pipeline[0], "modality_config", {})


def _pair_template(first: Any, plan: PipelinePlan, name: str) -> PairTemplate:
    """Split the text that a chat template makes of a pair at the query and at the document."""
    options = dict((getattr(first, "processing_kwargs", None) or {}).get("chat_template", {}))
    options.pop("restore_suffix", None)

    def render(instruction: str | None) -> tuple[str, str, str] | None:
        messages = [first.input_formatter.pair_to_messages((_QUERY, _DOCUMENT))]
        if instruction is not None:
            messages = first.input_formatter.prepend_prompt_to_messages(messages, instruction)
        text = first.tokenizer.apply_chat_template(messages[0], tokenize=False, **options)
        parts = re.split(f"{_QUERY}|{_DOCUMENT}", text)
        if len(parts) != 3 or text.index(_QUERY) > text.index(_DOCUMENT):
            return None
        return parts[0], parts[1], parts[2]

    try:
        parts = render(plan.prompts.get(plan.default_prompt or "") or None)
        instructed = render(_INSTRUCTION)
    except Exception as error:
        raise UnsupportedModelError(f"{name}: its chat template fails on a query and a document: {error}") from error
    if parts is None:
        raise UnsupportedModelError(
            f"{name} has a chat template that does not put a query and a document into one text once, in this order. A "
            "reranker needs one with the roles 'query' and 'document', as sentence-transformers saves it."
        )
    around = None
    if instructed is not None and instructed[1:] == parts[1:] and instructed[0].count(_INSTRUCTION) == 1:
        before, _, after = instructed[0].partition(_INSTRUCTION)
        around = before, after
    return PairTemplate(*parts, around_instruction=around)


def _token_rules(pipeline: BaseModel, plan: PipelinePlan, name: str) -> TokenRules | None:
    tokenizer: Any = getattr(pipeline[0], "tokenizer", None)
    if plan.kind == "bge-m3":
        special = (tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        return TokenRules(
            unweighted_ids=tuple(sorted({each for each in special if each is not None})), skips_first=True
        )
    if plan.kind == "sparse" and isinstance(pipeline[0], SparseStaticEmbedding):
        # It replaces a text without tokens.
        return TokenRules(unweighted_ids=(tokenizer.pad_token_id or 0,))
    if plan.kind != "multi-vector":
        return None
    first: Any = pipeline[0]
    masks = [module for module in pipeline if isinstance(module, MultiVectorMask)]
    if len(masks) > 1 or any(mask.keep_only_token_ids for mask in masks):
        raise UnsupportedModelError(f"{name} keeps the vectors of some token ids only, which is not supported.")
    words = [word for mask in masks for word in mask.skiplist_words]
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in words}
    skipped = {each for word, each in ids.items() if each != tokenizer.unk_token_id or word == tokenizer.unk_token}
    expansion = first.query_expansion
    rules = TokenRules(
        skipped_ids=tuple(sorted(skipped)),
        skipping_tasks=tuple(masks[0].skiplist_tasks) if masks else (),
        query_length=first.query_length,
        document_length=first.document_length,
    )
    if expansion is None:
        return rules
    token = expansion["token"] or tokenizer.mask_token or tokenizer.eos_token
    if tokenizer.padding_side == "left" or not masks:
        raise UnsupportedModelError(f"{name} expands its queries in a way that is not supported.")
    length = expansion["length"]
    return replace(
        rules,
        query_length=length
        if expansion["strategy"] == "fixed"
        else rules.query_length and max(rules.query_length, length),
        expansion_id=tokenizer.convert_tokens_to_ids(token),
        expansion_length=length,
        expansion_is_attended=expansion["attend"],
    )


def _mode(pooling: Pooling) -> str:
    return pooling.pooling_mode if isinstance(pooling.pooling_mode, str) else "+".join(pooling.pooling_mode)


def _smaller_than(
    dimension: int, sizes: tuple[int, ...] | Literal["any"] | None
) -> tuple[int, ...] | Literal["any"] | None:
    if sizes is None or sizes == "any":
        return sizes
    return tuple(size for size in sizes if 0 < size < dimension) or None


def _fast_tokenizer(pipeline: BaseModel, kind: Kind, name: str) -> PreTrainedTokenizerFast:
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
    if kind != "reranker" and any(tokenizer("a", return_token_type_ids=True)["token_type_ids"]):
        raise UnsupportedModelError(
            f"{name} gives the tokens of a single text different types (token_type_ids), which is not supported."
        )
    return tokenizer


def _embedding_rows(pipeline: BaseModel, tokens: int) -> int:
    rows = getattr(word_table(pipeline), "num_embeddings", None)
    return int(rows or getattr(pipeline.config, "vocab_size", None) or tokens)


def _pad_token_id(tokenizer: PreTrainedTokenizerFast, pipeline: BaseModel, vocab_size: int) -> int:
    # If there is none, any id can be used, because the attention mask hides it.
    for candidate in (tokenizer.pad_token_id, getattr(pipeline.config, "pad_token_id", None), tokenizer.eos_token_id):
        if isinstance(candidate, int) and 0 <= candidate < vocab_size:
            return candidate
    return 0


def _max_length(pipeline: BaseModel, tokenizer: PreTrainedTokenizerFast, plan: PipelinePlan, notes: list[str]) -> int:
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


def _positions(pipeline: BaseModel) -> int | None:
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
