"""Loads the pipeline of a plan with sentence-transformers, for the torch backend and for the compiler.

It reads local files only: weights from safetensors or, with PyTorch's weights-only loader, from `.bin` files.
"""

from __future__ import annotations

import re
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
from transformers.utils import logging as transformers_logging

from emb_model_provider.backends.hardware import cuda_problem
from emb_model_provider.backends.model_kind import GENERATES, POOLING_ADVICE, TRUST_ADVICE
from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.backends.precision import DeviceFacts, resolve_device, resolve_torch_precision
from emb_model_provider.backends.pytorch.heads import remove_final_normalize, run_pipeline
from emb_model_provider.backends.pytorch.tokenizer import use_declared_tokenizer
from emb_model_provider.backends.pytorch.view import open_view
from emb_model_provider.backends.repository import Repository
from emb_model_provider.concurrency import BoundedLock
from emb_model_provider.errors import DeviceUnavailableError, LoadError, UnsupportedModelError, is_failure

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from emb_model_provider.backends.base import ComputePrecision
    from emb_model_provider.backends.pipeline_plan import PipelinePlan
    from emb_model_provider.model_spec import Kind, ModelSpec, Precision
    from emb_model_provider.model_spec import Pooling as PoolingName
    from emb_model_provider.snapshots.snapshot import Snapshot

DTYPES: dict[ComputePrecision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_LOADING = BoundedLock(1800, "another model has been loading")
"""Held while a model is loaded, because transformers changes the default dtype of the process. Of two loads at the same
time, one could restore the dtype that the other one had set, so that all later tensors would be bf16."""

_TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_QWEN3_RERANKER = """\
<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. \
Note that the answer can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ messages | selectattr("role", "eq", "system") | map(attribute="content") | first \
| default("Given a web search query, retrieve relevant passages that answer the query", true) }}
<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}<|im_end|>
<|im_start|>assistant
<think>

</think>

{{ "" }}"""
"""The chat template of Qwen3-Reranker, from its model card. The repository itself has that of Qwen3. The last line keeps
Jinja from removing the line break before it."""
_TEMPLATE_NOTE = "the repository has no chat template for a query and a document: that of Qwen3-Reranker is used"
_ADAPTER_WEIGHTS = ("lora_", "adapter", "ia3_", "prompt_embeddings")
"""Parts of the names of weights that belong to an adapter."""
_RECOMPUTED = frozenset(
    {"position_ids", "token_type_ids", "inv_freq", "masked_bias", "bias_mask", "num_batches_tracked"}
)
"""Last parts of the names of buffers that older versions of transformers saved, and that newer ones compute."""
_CAUSES: tuple[tuple[re.Pattern[str], type[LoadError], str], ...] = (
    (
        re.compile(r"model type `([^`]+)` but Transformers does not recognize"),
        UnsupportedModelError,
        "transformers {version} does not have the model type {0!r}. A newer version may have it: `uv sync "
        "--upgrade-package transformers`, or pip install -U transformers. If the repository contains code for it: "
        + TRUST_ADVICE,
    ),
    (
        re.compile(r"Unrecognized model in|Should have a `model_type` key"),
        UnsupportedModelError,
        "its config.json has no model_type. It may not be a model of transformers; choose another repository.",
    ),
    (
        re.compile(r"Error while deserializing|invalid header or archive|PytorchStreamReader failed"),
        LoadError,
        "its weights are damaged or incomplete. Download the model again.",
    ),
    (
        re.compile(r"size mismatch for (\S+?):|(?:ignore_mismatched_sizes)"),
        LoadError,
        "its weights do not have the sizes that its config.json declares. Compare config.json with the original.",
    ),
    (
        re.compile(r"Couldn't instantiate the backend tokenizer|Can't load tokenizer|Can't load processor"),
        UnsupportedModelError,
        "it has no tokenizer that can be read here (tokenizer.json, vocab.txt, or a sentencepiece model). Download the "
        "model again, or choose one with a fast tokenizer.",
    ),
    (
        re.compile(r"Unrecognized processing class|Can't instantiate a processor"),
        UnsupportedModelError,
        "it has no tokenizer, so it does not read text: it may be a model of images or audio. Choose an embedding model.",
    ),
    (
        re.compile(r"(CUDA error: (?!out of memory).{0,120})"),
        DeviceUnavailableError,
        "the GPU has failed ({0}), and cannot be used again in this process. Restart the service; with "
        "EMB_PROVIDER_SUPERVISE=true it restarts by itself.",
    ),
    (
        re.compile(r"requires the (\S+) library|No module named '([^']+)'"),
        LoadError,
        "a Python package that it needs is not installed ({0}{1}). Install it next to the service (pip install).",
    ),
)
"""Parts of the messages of libraries, and what to do."""
_TEXT_SETTINGS_WITHOUT_EFFECT = {"padding", "truncation", "max_length"}
"""Keys of a Transformer's `processing_kwargs` that are handled elsewhere, or that depend on the batch."""


def torch_device_facts() -> DeviceFacts:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return DeviceFacts(
        cuda_capabilities=tuple(torch.cuda.get_device_capability(index) for index in range(count)),
        lowest_capability=lowest_capability(torch.cuda.get_arch_list()) if count else (0, 0),
        cuda_problem="" if count else cuda_problem(),
        mps=torch.backends.mps.is_available(),
    )


def lowest_capability(architectures: Sequence[str]) -> tuple[int, int]:
    """Return the lowest compute capability of the kernels of a build, such as (7, 5) for `sm_75`."""
    digits = [name.partition("_")[2].rstrip("af") for name in architectures]
    return min(((int(each[:-1]), int(each[-1])) for each in digits if each.isdecimal()), default=(0, 0))


def free_device_memory(device: torch.device | str) -> int:
    """Return the bytes that this process can still allocate on a CUDA device."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def load_sentence_transformer(
    spec: ModelSpec, snapshot: Snapshot, precision: Precision, *, trust_remote_code: bool
) -> SentenceTransformer:
    """Load a snapshot on the device of `spec`, with the pipeline that its files declare; not at int8 or int4."""
    facts = torch_device_facts()
    device = resolve_device(spec.device, facts)
    plan = plan_pipeline(spec, snapshot, trust_remote_code=trust_remote_code)
    resolved = resolve_torch_precision(precision, device, facts)
    pipeline = load_pipeline(plan, snapshot, precision=resolved, device=device, trust_remote_code=trust_remote_code)[0]
    if not isinstance(pipeline, SentenceTransformer):
        raise UnsupportedModelError(
            f"{snapshot.repository} is of the kind {plan.kind!r}, which SentenceTransformer does not load. Load it with "
            f"{pipeline.model_type} of sentence-transformers."
        )
    return pipeline


def load_pipeline(
    plan: PipelinePlan, snapshot: Snapshot, *, precision: ComputePrecision, device: str, trust_remote_code: bool
) -> tuple[BaseModel, PipelinePlan]:
    """Load the pipeline of a plan at fp32, fp16 or bf16, in evaluation mode. One load runs at a time in a process.

    The pipeline ends in Normalize if the plan or `modules.json` says so. Like `encode` of sentence-transformers, the
    caller truncates its vectors to `truncate_dim` after the last module. Errors are LoadErrors that begin with the name
    of the repository.

    Returns:
        The pipeline, and the plan with notes on what was found while loading.
    """
    # The dtype is always specified, because the default of a repository may be fp16, which is slow or wrong on a CPU.
    options: dict[str, Any] = {"dtype": DTYPES[precision]}
    repository = Repository.of(snapshot, plan.route)
    name = repository.name
    template = _pair_template(plan, repository)
    if template is not None:
        plan = replace(plan, notes=(*plan.notes, _TEMPLATE_NOTE))
    try:
        with _LOADING, _quiet_progress(), open_view(repository, snapshot.digest) as directory:
            try:
                if plan.layout == "sentence-transformers" or plan.kind == "multi-vector":
                    pipeline: BaseModel = _CLASSES[plan.kind](
                        str(directory),
                        device=device,
                        local_files_only=True,
                        trust_remote_code=trust_remote_code,
                        model_kwargs=options,
                    )
                else:
                    pipeline = _build(plan, directory, options, device, trust_remote_code, template)
                if plan.route is not None:
                    pipeline = _select_route(pipeline, plan.route, device)
                if repository.adapter:
                    _merge_adapter(pipeline, repository)
                notes = use_declared_tokenizer(pipeline, repository)
            except LoadError:
                raise
            except BaseException as error:
                if not is_failure(error):
                    raise
                raise explain_error(error, name, str(directory)) from error
    except OSError as error:
        raise explain_error(error, name) from error
    _check(pipeline, plan, name)
    if isinstance(pipeline, SentenceTransformer):
        _apply_overrides(pipeline, plan, name)
        pipeline.truncate_dim = plan.truncate_dim
    if isinstance(pipeline[0], StaticEmbedding):
        pipeline.to(dtype=DTYPES[precision])
    return pipeline.eval(), replace(plan, notes=(*plan.notes, *notes))


def array_widths(pipeline: BaseModel, names: Sequence[str]) -> dict[str, int]:
    """Run a few tokens through a served pipeline, and return the last dimension of the named arrays."""
    # Not one, because models that pool inside (Funnel) need several.
    ids = torch.zeros((1, 8), dtype=torch.int64, device=pipeline.device)
    if isinstance(pipeline[0], StaticEmbedding):
        features = {"input_ids": ids[0], "offsets": ids[0, :1]}
    else:
        features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return {name: array.shape[-1] for name, array in run_pipeline(pipeline, features, names).items()}


def word_table(pipeline: BaseModel) -> Any:
    """Return the module that looks up token vectors, or None for a model without one, such as that of images."""
    if pipeline.transformers_model is not None:
        with suppress(NotImplementedError):
            return pipeline.transformers_model.get_input_embeddings()
    return None


def explain_error(error: BaseException, name: str, directory: str | None = None) -> LoadError:
    """Return a LoadError that says what to do about an error of the libraries that load a model.

    Args:
        error: The error.
        name: The name of the model.
        directory: The directory that the libraries were given, and which the message of the error may contain.
    """
    # All lines, because PyTorch names the weights that do not fit in the later ones.
    text = " ".join(str(error).split())
    if directory is not None:
        text = text.replace(directory, name)
    if "trust_remote_code" in text:
        return UnsupportedModelError(f"{name} needs code from its repository to run. {TRUST_ADVICE}")
    if isinstance(error, torch.OutOfMemoryError):
        return LoadError(
            f"{name} does not fit into the device's free memory. Choose a lower precision (`--precision`, or "
            "EMB_PROVIDER_MODEL_PRECISION), another device (`--device`, or EMB_PROVIDER_DEVICE), or a smaller model."
        )
    for pattern, kind, advice in _CAUSES:
        if (match := pattern.search(text)) is not None:
            return kind(
                f"{name} cannot be loaded: {advice.format(*(group or '' for group in match.groups()), version=transformers.__version__)}"
            )
    return LoadError(f"{name} cannot be loaded: {type(error).__name__}: {text[:600]}")


class _CheckedTransformer(Transformer):
    """A Transformer that records which weights are missing in the files, and which of those in the files are not used.

    transformers initializes missing weights randomly, skips the others, and only logs both.
    """

    missing_weights: frozenset[str] = frozenset()
    unused_weights: frozenset[str] = frozenset()

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        # With output_loading_info, from_pretrained returns a pair, which the base class passes on.
        result: Any = super()._load_model(*args, **kwargs, output_loading_info=True)
        model, info = result
        self.missing_weights = frozenset(info["missing_keys"])
        self.unused_weights = frozenset(info["unexpected_keys"])
        return model


class _CheckedModules(BaseModel):
    """Loads the modules of a directory, with transformers that record their weights."""

    def _load_module_class_from_ref(self, class_ref: str, *args: Any, **kwargs: Any) -> Any:
        module = super()._load_module_class_from_ref(class_ref, *args, **kwargs)
        if module is MLMTransformer:
            return _CheckedMaskedLanguageModel
        return _CheckedTransformer if module is Transformer else module


class _CheckedMaskedLanguageModel(MLMTransformer, _CheckedTransformer):
    """The transformer of older sparse models."""


class _CheckedSentenceTransformer(_CheckedModules, SentenceTransformer):
    pass


class _CheckedCrossEncoder(_CheckedModules, CrossEncoder):
    pass


class _CheckedSparseEncoder(_CheckedModules, SparseEncoder):
    pass


class _CheckedMultiVectorEncoder(_CheckedModules, MultiVectorEncoder):
    pass


_CLASSES: Mapping[Kind, type[BaseModel]] = {
    "dense": _CheckedSentenceTransformer,
    "reranker": _CheckedCrossEncoder,
    "classifier": _CheckedCrossEncoder,
    "sparse": _CheckedSparseEncoder,
    "multi-vector": _CheckedMultiVectorEncoder,
    "bge-m3": _CheckedSentenceTransformer,
}


def _pair_template(plan: PipelinePlan, repository: Repository) -> str | None:
    """Return the chat template that a language model needs as a reranker, or None if its own files are used.

    Raises:
        UnsupportedModelError: It needs one that is not known here.
    """
    if plan.kind != "reranker" or plan.layout != "transformers" or not (plan.architecture or "").endswith(GENERATES):
        return None
    declared = "".join(
        repository.files[name].read_text(encoding="utf-8", errors="replace")
        for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
        if name in repository.files
    )
    if all(re.search(rf"""["']{role}\\?["']""", declared) for role in ("query", "document")):
        return None
    if repository.config.get("model_type") == "qwen3":
        return _QWEN3_RERANKER
    raise UnsupportedModelError(
        f"{repository.name} is a language model that is to score pairs, and its files do not say how a query and a document "
        "become a prompt. Choose a version of it that sentence-transformers has saved as a CrossEncoder (with "
        "modules.json), or add a chat_template.jinja with the roles 'query' and 'document'."
    )


def _build(
    plan: PipelinePlan,
    directory: Path,
    options: dict[str, Any],
    device: str,
    trust_remote_code: bool,
    template: str | None,
) -> BaseModel:
    """Build the pipeline of a directory without `modules.json`. Its normalization is added by `_apply_overrides`."""
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    kwargs: dict[str, Any] = {
        "model_kwargs": {**local, **options},
        "processor_kwargs": dict(local),
        "config_kwargs": dict(local),
    }
    path = str(directory)
    common: dict[str, Any] = {
        "device": device, "local_files_only": True, "prompts": dict(plan.prompts), "default_prompt_name": plan.default_prompt
    }  # fmt: skip
    match plan.kind:
        case "reranker" if (plan.architecture or "").endswith(GENERATES):
            if template is not None:
                kwargs["processor_kwargs"]["chat_template"] = template
            model = _CheckedTransformer(path, transformer_task="text-generation", **kwargs)
            yes, no = (model.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
            if None in (yes, no) or model.tokenizer.unk_token_id in (yes, no):
                raise UnsupportedModelError(
                    f"{plan.architecture} scores a pair by the words yes and no, and its tokenizer does not have them as "
                    "tokens. Choose another reranker."
                )
            return CrossEncoder(modules=[model, LogitScore(yes, no)], **common)  # type: ignore[no-any-return]  # its decorator is untyped
        case "reranker" | "classifier":
            model = _CheckedTransformer(path, transformer_task="sequence-classification", **kwargs)
            return CrossEncoder(modules=[model], **common)  # type: ignore[no-any-return]  # likewise
        case "sparse":
            modules = [_CheckedTransformer(path, transformer_task="fill-mask", **kwargs), SpladePooling("max")]
            return SparseEncoder(modules=modules, **common)
    # Set to plain text, because sentence-transformers would render every input as a chat message if the tokenizer has
    # a chat template.
    transformer = _CheckedTransformer(path, modality_config=_TEXT_ONLY, module_output_name="token_embeddings", **kwargs)
    pooling = plan.pooling or _default_pooling(transformer)
    return SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling)],
        device=device,
        local_files_only=True,
    )


def _select_route(pipeline: BaseModel, route: str, device: str) -> BaseModel:
    """Return a pipeline with the modules of a route in the place of the Router."""
    modules: list[torch.nn.Module] = []
    for module in pipeline:
        modules.extend(module.sub_modules[route].children() if isinstance(module, Router) else [module])
    kind = SparseEncoder if isinstance(pipeline, SparseEncoder) else SentenceTransformer
    return kind(modules=modules, device=device, local_files_only=True)


def _merge_adapter(pipeline: BaseModel, repository: Repository) -> None:
    first: Any = pipeline[0]
    if not isinstance(first, Transformer):
        raise UnsupportedModelError(
            f"{repository.name} is an adapter, and its base model {repository.base} is not a transformer."
        )
    from emb_model_provider.backends.pytorch.lora import merge_adapter  # PEFT takes a second to import

    merge_adapter(first, repository)


def _default_pooling(transformer: Transformer) -> Any:
    """Return the pooling that sentence-transformers uses for models that declare none."""
    architectures = getattr(transformer.config, "architectures", None) or [""]
    causal = architectures[0].endswith("ForCausalLM") and getattr(transformer.config, "is_causal", True)
    return "lasttoken" if causal else "mean"


def _apply_overrides(pipeline: SentenceTransformer, plan: PipelinePlan, name: str) -> None:
    if plan.layout == "sentence-transformers" and plan.pooling is not None:
        _replace_pooling(pipeline, plan.pooling, name)
    if plan.normalize is not None:
        remove_final_normalize(pipeline)
        if plan.normalize:
            # Not `append`, because it uses a number as name, which modules.json may have used already.
            pipeline.add_module("final_normalize", Normalize())


def _replace_pooling(pipeline: SentenceTransformer, pooling: PoolingName, name: str) -> None:
    indexes = [index for index, module in enumerate(pipeline) if isinstance(module, Pooling)]
    if len(indexes) != 1:
        raise UnsupportedModelError(
            f"{name}: pooling={pooling} cannot be applied, because modules.json has {len(indexes)} Pooling modules. "
            'Remove the key "pooling" of this model from EMB_PROVIDER_MODEL_MAPPING.'
        )
    index = indexes[0]
    old: Any = pipeline[index]
    new = Pooling(old.embedding_dimension, pooling, include_prompt=old.include_prompt)
    following = {type(module).__name__ for module in list(pipeline)[index + 1 :]} - {"Normalize"}
    if following and new.pooling_output_dimension != old.pooling_output_dimension:
        raise UnsupportedModelError(
            f"{name}: pooling={pooling} returns {new.pooling_output_dimension} values, but "
            f'{", ".join(sorted(following))} requires {old.pooling_output_dimension}. Remove the key "pooling" '
            "of this model from EMB_PROVIDER_MODEL_MAPPING."
        )
    pipeline[index] = new


def _check(pipeline: BaseModel, plan: PipelinePlan, name: str) -> None:
    """Reject pipelines whose vectors would be noise or those of another model, or whose inputs are not plain text."""
    first: Any = pipeline[0]
    if any(isinstance(module, Router) for module in pipeline.modules()):
        raise UnsupportedModelError(
            f"{name} sends queries and documents through different modules (Router): load one of its routes."
        )
    modalities = getattr(first, "modality_config", {"text": {}})
    if "message" in modalities and plan.kind not in ("reranker", "classifier"):
        # sentence-transformers renders every text with the template if `message` is declared, even if `text` is
        # declared, too. Plain text would have other vectors.
        raise UnsupportedModelError(
            f"{name} renders its inputs through a chat template (its modules declare the modality 'message'), "
            "which is not supported. Choose a model that embeds plain text."
        )
    if not {"text", "message"}.intersection(modalities):
        raise UnsupportedModelError(f"{name} does not embed text (its inputs are: {', '.join(map(str, modalities))}).")
    settings = getattr(first, "processing_kwargs", None) or {}
    unknown = {**settings.get("text", {}), **settings.get("common", {})}.keys() - _TEXT_SETTINGS_WITHOUT_EFFECT
    if unknown:
        raise UnsupportedModelError(
            f"{name} changes how text is tokenized ({', '.join(sorted(unknown))} in its processing_kwargs), "
            "which is not supported."
        )
    for module in pipeline.modules():
        if isinstance(module, _CheckedTransformer):
            _check_class(module, plan, name)
            _check_weights(module, name)


def _check_class(transformer: _CheckedTransformer, plan: PipelinePlan, name: str) -> None:
    """Reject a model that transformers has loaded as another class than its configuration declares."""
    loaded, declared = type(transformer.model), plan.architecture
    if not declared or not loaded.__module__.startswith("transformers."):
        return
    known: Any = getattr(transformers, declared, None)
    config = type(transformer.config)
    kind = getattr(known, "config_class", None)
    if isinstance(kind, type) and (issubclass(config, kind) or issubclass(kind, config)):
        return
    if kind is not None and transformer.config.model_type == getattr(kind, "model_type", None):
        return
    problem = (
        f"which transformers {transformers.__version__} does not have"
        if known is None
        else f"but the model type {transformer.config.model_type!r}"
    )
    raise UnsupportedModelError(
        f"{name} declares the class {declared}, {problem}. {loaded.__name__} would be loaded in its place, and its "
        f"vectors could be others. If the model's card says that they are the same, set {POOLING_ADVICE}."
    )


def _check_weights(transformer: _CheckedTransformer, name: str) -> None:
    """Reject a model if its files lack weights of its modules, or have weights of modules that it does not have."""
    outputs = {str(params["method_output_name"]) for params in transformer.modality_config.values()}
    missing = sorted(
        key
        for key in transformer.missing_weights
        # Checkpoints often omit the pooler of BERT, because token vectors do not depend on it, unlike scores.
        if outputs & {"pooler_output", "logits"} or "pooler" not in key.split(".")
    )
    if missing:
        raise LoadError(
            f"{name}: {len(missing)} weights (such as {missing[0]}) are missing in the weight files, so its "
            "vectors would be noise. The repository may be incomplete, or may contain another type of model."
        )
    unused = sorted(key for key in transformer.unused_weights if _matters(key, transformer.model))
    if unused:
        reason = (
            "They belong to an adapter, which is not merged: merge it into the model, and save that."
            if any(part in unused[0] for part in _ADAPTER_WEIGHTS)
            else "config.json may declare fewer layers than there are, or a feature that transformers "
            f"{transformers.__version__} does not have. Compare it with the original, or choose another model."
        )
        raise LoadError(
            f"{name}: {len(unused)} weights in its files (such as {unused[0]}) belong to no module of "
            f"{type(transformer.model).__name__}, so its vectors would not be those of the model. {reason}"
        )


def _matters(key: str, model: torch.nn.Module) -> bool:
    """Return whether a weight is inside the loaded model, and not part of a head or of another tower."""
    parts = key.split(".")
    if parts[-1] in _RECOMPUTED or "pooler" in parts:
        return False
    if any(part in key for part in _ADAPTER_WEIGHTS):
        return True
    inside = {name for name, _ in model.named_children()}
    prefix = getattr(model, "base_model_prefix", "")
    if parts[0] == prefix and prefix:
        parts = parts[1:]
        inside |= {name for name, _ in getattr(model, "base_model", model).named_children()}
    return parts[0] in inside and "seq_relationship" not in parts


@contextmanager
def _quiet_progress() -> Iterator[None]:
    """Disable the progress bars of transformers, which would be written to the log of the service."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # likewise
