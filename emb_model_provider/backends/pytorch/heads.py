"""The last modules of each kind of model, as they are served: they return the arrays of `ModelDescription.arrays`.

They compute what the modules of sentence-transformers (or, for BGE-M3, FlagEmbedding) do, in a form that needs less memory
and time. What depends on token ids only, such as skipping punctuation, is left to `backends.arrays`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

from emb_model_provider.backends.base import (
    ATTENTION_MASK,
    INPUT_IDS,
    SCORES,
    SENTENCE_EMBEDDING,
    TERM_WEIGHTS,
    TOKEN_VECTORS,
    TOKEN_WEIGHTS,
)
from emb_model_provider.backends.model_kind import BGE_M3_HEADS
from emb_model_provider.errors import LoadError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentence_transformers.base.model import BaseModel

    from emb_model_provider.backends.pipeline_plan import PipelinePlan
    from emb_model_provider.backends.repository import Repository

_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_scale")
"""Keys of configurations of language models whose logits are not the product of vectors and weights alone."""


@dataclass(frozen=True, slots=True)
class Served:
    """A pipeline as it is served."""

    pipeline: BaseModel
    """It shares the weights of the loaded pipeline."""
    arrays: tuple[str, ...]
    """Names of the arrays that it returns; see `ModelDescription.arrays`."""
    normalize: bool = False
    """Whether a final normalization was removed, which the engine does."""
    has_token_types: bool = False
    """Whether it reads the types of tokens; see `ModelDescription.has_token_types`."""


def serve_pipeline(pipeline: BaseModel, plan: PipelinePlan, repository: Repository) -> Served:
    """Return the served form of a loaded pipeline, which remains the reference.

    The final normalization of dense vectors is removed from the loaded pipeline, too.

    Raises:
        UnsupportedModelError: The pipeline has modules that are not supported for its kind.
    """
    normalize = strip_final_normalize(pipeline, plan)
    arrays: tuple[str, ...]
    match plan.kind:
        case "dense":
            return Served(pipeline, (SENTENCE_EMBEDDING,), normalize)
        case "reranker" | "classifier":
            modules, arrays = _score_modules(pipeline), (SCORES,)
        case "sparse":
            modules = _sparse_modules(pipeline, repository.name)
            arrays = (TOKEN_WEIGHTS,) if isinstance(modules[0], StaticTermWeights) else (TERM_WEIGHTS,)
        case "multi-vector":
            modules, arrays = _token_vector_modules(pipeline, repository.name), (TOKEN_VECTORS,)
        case "bge-m3":
            modules = [*pipeline, BgeM3Heads(pipeline, repository)]
            arrays = (SENTENCE_EMBEDDING, TOKEN_WEIGHTS, TOKEN_VECTORS)
    served = SentenceTransformer(modules=modules, device=str(pipeline.device), local_files_only=True)
    return Served(served.eval(), arrays, normalize, arrays == (SCORES,) and _reads_token_types(pipeline))


def _reads_token_types(pipeline: BaseModel) -> bool:
    """Return whether the tokenizer gives the texts of a pair different types, and the model distinguishes them."""
    model: Any = pipeline.transformers_model
    types = pipeline.tokenizer("a", "b").get("token_type_ids") or ()
    return any(types) and "token_type_ids" in inspect.signature(model.forward).parameters


def strip_final_normalize(pipeline: BaseModel, plan: PipelinePlan) -> bool:
    """Remove the final normalization from a pipeline in place, and return whether there was one.

    A Normalize before another module, such as Dense, is part of the model and is kept. So is one whose vectors
    sentence-transformers truncates to `truncate_dim` afterwards; truncated vectors are shorter than 1, like those of
    `encode`.
    """
    if plan.truncate_dim is not None and plan.normalize is None:
        return False
    return remove_final_normalize(pipeline)


def remove_final_normalize(pipeline: BaseModel) -> bool:
    removed = False
    while len(pipeline) > 1 and _normalizes_embedding(pipeline[len(pipeline) - 1]):
        del pipeline[len(pipeline) - 1]
        removed = True
    return removed


def _normalizes_embedding(module: torch.nn.Module) -> bool:
    return isinstance(module, Normalize) and module.module_input_name == module.module_output_name == SENTENCE_EMBEDDING


def run_pipeline(pipeline: BaseModel, features: dict[str, Any], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Run a served pipeline, and return the named arrays. Vectors are truncated to `truncate_dim`."""
    results = pipeline({**features, **constant_features(pipeline)})
    truncate_dim = getattr(pipeline, "truncate_dim", None)
    return {name: results[name][:, :truncate_dim] if name == SENTENCE_EMBEDDING else results[name] for name in names}


def constant_features(pipeline: BaseModel) -> dict[str, Any]:
    """Return what a pipeline reads besides arrays: which method of the model to call, and for which tokens it needs logits."""
    features: dict[str, Any] = {}
    first = pipeline[0]
    if isinstance(first, Transformer) and "text" not in first.modality_config and "message" in first.modality_config:
        features["modality"] = "message"
    if any(isinstance(module, LogitScore) for module in pipeline):
        features["logits_to_keep"] = 1
    return features


def _score_modules(pipeline: BaseModel) -> list[torch.nn.Module]:
    modules = list(pipeline)
    if len(modules) == 2 and isinstance(modules[1], LogitScore):
        column = _score_column(pipeline, modules[1])
        if column is not None:
            return [_LanguageModelBody(pipeline), ScoreOfLastToken(column)]
    return modules


def _score_column(pipeline: BaseModel, score: LogitScore) -> torch.nn.Linear | None:
    """Return the part of the output layer of a language model that a score needs, or None if it has another form.

    The difference of the logits of "yes" and "no" is one product instead of one for each word of the vocabulary.
    """
    model: Any = pipeline.transformers_model
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear) or any(
        getattr(model.config.get_text_config(), key, None) for key in _CHANGES_LOGITS
    ):
        return None
    rows = [score.true_token_id] + ([score.false_token_id] if score.false_token_id is not None else [])
    column = torch.nn.Linear(layer.in_features, 1, bias=layer.bias is not None)
    with torch.no_grad():
        weights, biases = layer.weight[rows], layer.bias[rows] if layer.bias is not None else None
        column.to(device=weights.device, dtype=weights.dtype)
        column.weight.copy_(weights[:1] - weights[1:] if len(rows) == 2 else weights)
        if biases is not None:
            column.bias.copy_(biases[:1] - biases[1:] if len(rows) == 2 else biases)
    return column


class _LanguageModelBody(torch.nn.Module):
    """The first module of a pipeline, without the output layer of its language model."""

    def __init__(self, pipeline: BaseModel) -> None:
        super().__init__()
        whole: Any = pipeline.transformers_model
        self.model = whole.base_model
        self.tokenizer = pipeline.tokenizer

    def forward(self, features: dict[str, Any], **_: object) -> dict[str, Any]:
        output = self.model(input_ids=features[INPUT_IDS], attention_mask=features[ATTENTION_MASK], use_cache=False)
        features[TOKEN_VECTORS] = output.last_hidden_state
        return features


class ScoreOfLastToken(torch.nn.Module):
    """The score of a language model from the vector of the last token. Inputs are padded on the left."""

    def __init__(self, column: torch.nn.Linear) -> None:
        super().__init__()
        self.column = column

    def forward(self, features: dict[str, Any], **_: object) -> dict[str, Any]:
        features[SCORES] = self.column(features[TOKEN_VECTORS][:, -1])
        return features


def _sparse_modules(pipeline: BaseModel, name: str) -> list[torch.nn.Module]:
    modules = list(pipeline)
    last = modules[-1]
    if isinstance(last, SparseStaticEmbedding) and len(modules) == 1:
        return [StaticTermWeights(last)]
    if isinstance(last, SpladePooling) and len(modules) == 2:
        return [modules[0], TermWeights(last)]
    names = ", ".join(type(module).__name__ for module in modules)
    raise UnsupportedModelError(f"{name} is a sparse model of modules that are not supported in this order: {names}.")


class TermWeights(torch.nn.Module):
    """SpladePooling with the maximum before the activation, which is monotonic: the same weights, about twice as fast."""

    def __init__(self, pooling: SpladePooling) -> None:
        super().__init__()
        self._takes_maximum = pooling.pooling_strategy == "max"
        self._activations = 2 if pooling.activation_function == "log1p_relu" else 1

    def forward(self, features: dict[str, Any], **_: object) -> dict[str, Any]:
        logits = features[TOKEN_VECTORS] * features[ATTENTION_MASK].unsqueeze(-1).to(features[TOKEN_VECTORS].dtype)
        weights = self._activate(logits.amax(dim=1)) if self._takes_maximum else self._activate(logits).sum(dim=1)
        features[TERM_WEIGHTS] = weights
        return features

    def _activate(self, values: torch.Tensor) -> torch.Tensor:
        values = values.relu()
        for _ in range(self._activations):
            values = values.log1p()
        return values


class StaticTermWeights(torch.nn.Module):
    """SparseStaticEmbedding as a weight for each token, such as its inverse document frequency."""

    def __init__(self, static: SparseStaticEmbedding) -> None:
        super().__init__()
        self.weight = static.weight
        self.tokenizer = static.tokenizer

    def forward(self, features: dict[str, Any], **_: object) -> dict[str, Any]:
        weights = torch.nn.functional.embedding(features[INPUT_IDS], self.weight.unsqueeze(1)).squeeze(-1)
        features[TOKEN_WEIGHTS] = weights * features[ATTENTION_MASK].to(weights.dtype)
        return features


def _token_vector_modules(pipeline: BaseModel, name: str) -> list[torch.nn.Module]:
    modules = [module for module in pipeline if not isinstance(module, MultiVectorMask)]
    for module in modules[1:]:
        if getattr(module, "module_input_name", None) != TOKEN_VECTORS:
            raise UnsupportedModelError(
                f"{name} has a module that is not supported in a multi-vector model: {type(module).__name__}."
            )
    return modules


class BgeM3Heads(torch.nn.Module):
    """The sparse and the multi-vector output of BGE-M3, with the formulas of FlagEmbedding."""

    def __init__(self, pipeline: BaseModel, repository: Repository) -> None:
        super().__init__()
        self.sparse, self.vectors = (_read_linear(repository, name) for name in BGE_M3_HEADS)
        self.to(device=pipeline.device, dtype=pipeline.dtype)

    def forward(self, features: dict[str, Any], **_: object) -> dict[str, Any]:
        tokens = features[TOKEN_VECTORS]
        features[TOKEN_WEIGHTS] = self.sparse(tokens).squeeze(-1).relu()
        features[TOKEN_VECTORS] = torch.nn.functional.normalize(self.vectors(tokens), dim=-1)
        return features


def _read_linear(repository: Repository, name: str) -> torch.nn.Linear:
    try:
        weights = torch.load(repository.files[name], map_location="cpu", weights_only=True)
        rows, columns = weights["weight"].shape
        linear = torch.nn.Linear(columns, rows)
        linear.load_state_dict(weights)
    except Exception as error:
        raise LoadError(
            f"{repository.name}: {name} cannot be read as a linear layer ({type(error).__name__}: {error}). Download the "
            "model again."
        ) from error
    return linear


def label_count(pipeline: BaseModel) -> int:
    """Return the number of columns of the scores of a reranker or classifier."""
    for module in reversed(list(pipeline)):
        if isinstance(module, Dense):
            return module.out_features
        if isinstance(module, LogitScore):
            return 1
    model: Any = pipeline.transformers_model
    return int(model.config.num_labels)
