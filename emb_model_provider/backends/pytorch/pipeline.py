"""Building a plan's pipeline with sentence-transformers: the torch backend's model, and the fp32 reference.

Reads local files only. Weights come from safetensors or, through PyTorch's weights-only loader, from `.bin`.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
from transformers.utils import logging as transformers_logging

from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.backends.precision import DeviceFacts, resolve_device, resolve_torch_precision
from emb_model_provider.errors import LoadError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.backends.base import ComputePrecision
    from emb_model_provider.backends.pipeline_plan import PipelinePlan
    from emb_model_provider.model_spec import ModelSpec, Precision
    from emb_model_provider.snapshots.snapshot import Snapshot

DTYPES: dict[ComputePrecision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

_LOADING = threading.Lock()
"""transformers sets PyTorch's default dtype, which is the whole process's, while it builds a model. Two loads at a
time could each restore what the other had set, and leave every later tensor in bf16."""

_TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_TEXT_SETTINGS_WITHOUT_EFFECT = {"padding", "truncation", "max_length"}
"""Keys of a Transformer's `processing_kwargs` that are honoured elsewhere, or that batching decides."""


def torch_device_facts() -> DeviceFacts:
    """Return what PyTorch sees on this machine."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return DeviceFacts(
        cuda_capabilities=tuple(torch.cuda.get_device_capability(index) for index in range(count)),
        mps=torch.backends.mps.is_available(),
    )


def load_sentence_transformer(
    spec: ModelSpec, snapshot: Snapshot, precision: Precision, *, trust_remote_code: bool
) -> SentenceTransformer:
    """Load a snapshot on the device of `spec`, with the pipeline that its files declare.

    Args:
        spec: The model.
        snapshot: Its files.
        precision: fp32, fp16, bf16 or auto.
        trust_remote_code: Whether code from the repository may run.

    Raises:
        LoadError: It cannot be loaded.
    """
    facts = torch_device_facts()
    device = resolve_device(spec.device, facts)
    plan = plan_pipeline(spec, snapshot, trust_remote_code=trust_remote_code)
    return load_pipeline(
        plan,
        precision=resolve_torch_precision(precision, device, facts),
        device=device,
        trust_remote_code=trust_remote_code,
    )


def load_pipeline(
    plan: PipelinePlan, *, precision: ComputePrecision, device: str, trust_remote_code: bool
) -> SentenceTransformer:
    """Load a plan's modules onto `device` in the dtype of `precision` (fp32, fp16 or bf16).

    One load runs at a time in a process. The pipeline is in evaluation mode and ends in Normalize exactly where the plan (or `modules.json`) says
    that vectors have length 1. Its `truncate_dim` is the plan's; like sentence-transformers' `encode`, the
    caller applies it after the last module.

    Raises: UnsupportedModelError where the model needs what is not supported, LoadError where its files do
    not make a model.
    """
    # The dtype is always said: a repository's own default may be fp16, which is slow or wrong on a CPU.
    options: dict[str, Any] = {"dtype": DTYPES[precision]}
    try:
        with _LOADING, _quiet_progress():
            if plan.layout == "sentence-transformers":
                pipeline: SentenceTransformer = _CheckedSentenceTransformer(
                    str(plan.directory),
                    device=device,
                    local_files_only=True,
                    trust_remote_code=trust_remote_code,
                    model_kwargs=options,
                )
            else:
                pipeline = _build(plan, options, device, trust_remote_code)
    except LoadError:
        raise
    except Exception as error:
        raise explained(error, plan) from error
    _check(pipeline, plan)
    _apply_overrides(pipeline, plan)
    pipeline.truncate_dim = plan.truncate_dim
    if isinstance(pipeline[0], StaticEmbedding):
        pipeline.to(dtype=DTYPES[precision])
    return pipeline.eval()


class _CheckedTransformer(Transformer):
    """A Transformer that remembers which of its weights the files did not hold.

    transformers fills such weights with random numbers and only logs it: the vectors would be noise.
    """

    missing_weights: frozenset[str] = frozenset()

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        # With output_loading_info, from_pretrained returns a pair that the base class hands through.
        loaded: Any = super()._load_model(*args, **kwargs, output_loading_info=True)
        model, info = loaded
        self.missing_weights = frozenset(info["missing_keys"])
        return model


class _CheckedSentenceTransformer(SentenceTransformer):
    def _load_module_class_from_ref(self, *args: Any, **kwargs: Any) -> type:
        found = super()._load_module_class_from_ref(*args, **kwargs)
        return _CheckedTransformer if found is Transformer else found


def _build(
    plan: PipelinePlan, options: dict[str, Any], device: str, trust_remote_code: bool
) -> SentenceTransformer:
    """Build Transformer, Pooling and perhaps Normalize for a directory without `modules.json`."""
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    # Plain text is pinned: where the tokenizer has a chat template, sentence-transformers would otherwise
    # render every input as a chat message.
    transformer = _CheckedTransformer(
        str(plan.directory),
        model_kwargs={**local, **options},
        processor_kwargs=dict(local),
        config_kwargs=dict(local),
        modality_config=_TEXT_ONLY,
        module_output_name="token_embeddings",
    )
    pooling = plan.pooling or _guessed_pooling(transformer)
    modules: list[torch.nn.Module] = [transformer, Pooling(transformer.get_embedding_dimension(), pooling)]
    if plan.normalize:
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, device=device, local_files_only=True)


def _guessed_pooling(transformer: Transformer) -> Any:
    """Return the pooling mode that sentence-transformers picks for a model that declares none."""
    architectures = getattr(transformer.config, "architectures", None) or [""]
    causal = architectures[0].endswith("ForCausalLM") and getattr(transformer.config, "is_causal", True)
    return "lasttoken" if causal else "mean"


def _apply_overrides(pipeline: SentenceTransformer, plan: PipelinePlan) -> None:
    """Put the plan's pooling and normalization over those of `modules.json`."""
    if plan.layout == "sentence-transformers" and plan.pooling is not None:
        _replace_pooling(pipeline, plan)
    if plan.normalize is not None:
        strip_final_normalize(pipeline)
        if plan.normalize:
            # By a name of its own: append would count, and modules.json may have used that number already.
            pipeline.add_module("final_normalize", Normalize())


def _replace_pooling(pipeline: SentenceTransformer, plan: PipelinePlan) -> None:
    places = [place for place, module in enumerate(pipeline) if isinstance(module, Pooling)]
    if len(places) != 1:
        raise UnsupportedModelError(
            f"{plan.directory.name}: pooling={plan.pooling} cannot be applied, since the model's modules.json has "
            f'{len(places)} Pooling modules. Leave the key "pooling" out of EMB_PROVIDER_MODEL_MAPPING.'
        )
    old: Any = pipeline[places[0]]
    new = Pooling(old.embedding_dimension, plan.pooling or "mean", include_prompt=old.include_prompt)
    if new.pooling_output_dimension != old.pooling_output_dimension and places[0] + 1 < len(pipeline):
        following = {type(module).__name__ for module in list(pipeline)[places[0] + 1 :]} - {"Normalize"}
        if following:
            raise UnsupportedModelError(
                f"{plan.directory.name}: pooling={plan.pooling} gives {new.pooling_output_dimension} values where "
                f'{", ".join(sorted(following))} reads {old.pooling_output_dimension}. Leave the key "pooling" '
                "out of EMB_PROVIDER_MODEL_MAPPING."
            )
    pipeline[places[0]] = new


def strip_final_normalize(pipeline: SentenceTransformer) -> bool:
    """Remove Normalize from the end of a pipeline, in place; return whether one stood there.

    A Normalize before another module (such as Dense) is part of the model, and stays.
    """
    found = False
    while len(pipeline) > 1 and _normalizes_embedding(pipeline[len(pipeline) - 1]):
        del pipeline[len(pipeline) - 1]
        found = True
    return found


def _normalizes_embedding(module: torch.nn.Module) -> bool:
    if not isinstance(module, Normalize):
        return False
    return module.module_input_name == module.module_output_name == "sentence_embedding"


def _check(pipeline: SentenceTransformer, plan: PipelinePlan) -> None:
    """Refuse a pipeline whose vectors would be noise, or whose inputs cannot be made from text alone."""
    name = plan.directory.name
    first: Any = pipeline[0]
    if isinstance(first, Router):
        raise UnsupportedModelError(
            f"{name} sends queries and documents through different modules (Router), which is not supported."
        )
    modalities = getattr(first, "modality_config", {"text": {}})
    if "message" in modalities:
        # sentence-transformers renders every text through the template as soon as `message` is declared, even
        # where `text` is declared too: plain text would give other vectors than the model's own.
        raise UnsupportedModelError(
            f"{name} renders its inputs through a chat template (its modules declare the modality 'message'), "
            "which is not supported. Choose a model that embeds plain text."
        )
    if "text" not in modalities:
        raise UnsupportedModelError(
            f"{name} does not embed text (it reads: {', '.join(map(str, modalities))})."
        )
    settings = getattr(first, "processing_kwargs", None) or {}
    unknown = {
        **settings.get("text", {}),
        **settings.get("common", {}),
    }.keys() - _TEXT_SETTINGS_WITHOUT_EFFECT
    if unknown:
        raise UnsupportedModelError(
            f"{name} changes how text is tokenized ({', '.join(sorted(unknown))} in its processing_kwargs), "
            "which is not supported."
        )
    for module in pipeline.modules():
        if isinstance(module, _CheckedTransformer):
            _refuse_missing_weights(module, name)


def _refuse_missing_weights(transformer: _CheckedTransformer, name: str) -> None:
    outputs = {str(params["method_output_name"]) for params in transformer.modality_config.values()}
    missing = sorted(
        key
        for key in transformer.missing_weights
        # BERT's pooler stands beside the token vectors: checkpoints often leave it out, and nothing reads it.
        if "pooler_output" in outputs or "pooler" not in key.split(".")
    )
    if missing:
        raise LoadError(
            f"{name}: the weight files lack {len(missing)} of the model's weights (such as {missing[0]}), so its "
            "vectors would be noise. The repository may be incomplete, or made for another class of model."
        )


def explained(error: Exception, plan: PipelinePlan) -> LoadError:
    """Say what to do about an error raised by the libraries while they read a model's files."""
    name, text = plan.directory.name, " ".join(str(error).split())
    if "trust_remote_code" in text:
        return UnsupportedModelError(
            f"{name} needs code from its repository to run. If you trust it, set "
            "EMB_PROVIDER_TRUST_REMOTE_CODE=true (ModelScope: EMB_PROVIDER_MODELSCOPE_TRUST_REMOTE_CODE), or "
            'the key "trust_remote_code" of this model in EMB_PROVIDER_MODEL_MAPPING.'
        )
    if isinstance(error, torch.OutOfMemoryError):
        return LoadError(
            f"{name} does not fit into the device's free memory. Choose a lower EMB_PROVIDER_MODEL_PRECISION, "
            "another EMB_PROVIDER_DEVICE, or a smaller model."
        )
    return LoadError(f"{name} cannot be loaded: {type(error).__name__}: {text[:600]}")


@contextmanager
def _quiet_progress() -> Iterator[None]:
    """Keep transformers' progress bars out of the service's log."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # likewise
