"""Plans the pipeline of a model: how its configuration files say that token vectors become one embedding.

It reads JSON files only, and imports no runtime.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from emb_model_provider.backends.model_kind import (
    POOLING_ADVICE,
    TRUST_ADVICE,
    architecture_of,
    recognize_kind,
    require_own_class,
)
from emb_model_provider.backends.repository import Repository, reading_files
from emb_model_provider.errors import LoadError, UnsupportedModelError
from emb_model_provider.snapshots.weights import is_weights, split_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from emb_model_provider.model_spec import Kind, ModelSpec, Pooling
    from emb_model_provider.snapshots.snapshot import Snapshot

MODELSCOPE_MAX_LENGTH = 512
"""Longest input of ModelScope's sentence-embedding pipelines in tokens, whatever the model supports."""
MODELSCOPE_POOLING: Mapping[str, Pooling] = {
    "cls": "cls",
    "avg": "mean",
    "mean": "mean",
    "weighted_mean": "weightedmean",
    "last": "lasttoken",
}
"""`model.emb_pooler_type` to pooling. ModelScope's avg_top2 and avg_first_last combine several layers."""

_GTE_NAME = re.compile(r"nlp_gte_sentence-embedding", re.IGNORECASE)
_GUESS_NOTE = "the repository does not say how its vectors are made"
_BIN_NOTE = "only .bin weights"
_CODE_NOTE = "trust_remote_code is on"
_OTHER_CODE_NOTE = "the model takes code from another repository"
_FOLDERS_NOTE = "the repository has no modules.json"
_WARNINGS = (_GUESS_NOTE, _BIN_NOTE, _CODE_NOTE, _OTHER_CODE_NOTE, _FOLDERS_NOTE)
"""Beginnings of the notes that need the attention of the operator.

The texts of all notes are part of the keys of artifacts: a change of them compiles all models again.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan:
    """How to turn a snapshot into a pipeline, as the repository declares it and the settings override it."""

    layout: Literal["sentence-transformers", "modelscope", "transformers"]
    kind: Kind = "dense"
    pooling: Pooling | None = None
    """None: as `modules.json` says or, without one, the default of sentence-transformers (last token for a causal
    language model, mean for all others)."""
    normalize: bool | None = None
    """Whether vectors are normalized to length 1. None: as `modules.json` says."""
    max_length: int | None = None
    """Upper bound of tokens per input, special tokens included. None: that of the tokenizer and the model."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    truncate_dim: int | None = None
    """Size to which vectors are truncated after all modules have run."""
    matryoshka: tuple[int, ...] | Literal["any"] | None = None
    route: str | None = None
    """The route of a Router whose modules are the pipeline."""
    architecture: str | None = None
    """The class that `config.json` declares, which must be the one that is loaded. None: the settings choose the
    pooling, so the class of the token vectors is chosen on purpose, too."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeclaredValues:
    """Values that the configuration files of a model declare; None if they do not."""

    dimensions: int | None
    max_tokens: int | None
    pooling: str | None
    normalized: bool | None


def plan_pipeline(spec: ModelSpec, snapshot: Snapshot, *, trust_remote_code: bool) -> PipelinePlan:
    """Read the configuration files of a snapshot, and plan its pipeline. Values of `spec` override those of the files.

    Raises:
        UnsupportedModelError: The repository is not an embedding model, or declares something that is not supported.
        LoadError: A configuration file is not valid JSON, or has a value of another type than expected.
    """
    with reading_files(snapshot.repository):
        return _plan_pipeline(spec, snapshot, trust_remote_code=trust_remote_code)


def declared_values(plan: PipelinePlan, snapshot: Snapshot) -> DeclaredValues:
    """Read the values that the configuration files of a model declare, without loading it."""
    with contextlib.suppress(LoadError), reading_files(snapshot.repository):
        repository = Repository.of(snapshot)
        modules = repository.modules
        configs = [repository.read(f"{module['path']}/config.json") for module in modules if module.get("path")]
        transformer = repository.read("sentence_bert_config.json")
        config = repository.config
        normalized = str(modules[-1].get("type", "")).endswith("Normalize") if modules else None
        return DeclaredValues(
            dimensions=plan.truncate_dim or _declared_dimension(configs, config),
            max_tokens=plan.max_length or transformer.get("max_seq_length") or config.get("max_position_embeddings"),
            pooling=plan.pooling or _declared_pooling(configs),
            normalized=plan.normalize if plan.normalize is not None else normalized,
        )
    return DeclaredValues(dimensions=None, max_tokens=None, pooling=None, normalized=None)


def _plan_pipeline(spec: ModelSpec, snapshot: Snapshot, *, trust_remote_code: bool) -> PipelinePlan:
    repository = Repository.of(snapshot, spec.route)
    config, st_config = repository.config, repository.read("config_sentence_transformers.json")
    configuration = repository.read("configuration.json")
    section = modelscope_model_section(configuration)
    pooling = spec.pooling if section is None else spec.pooling or "cls"
    kind = recognize_kind(repository, st_config, modelscope_tasks(configuration), requested=spec.kind, pooling=pooling)
    require_own_class(repository, kind, trust_remote_code=trust_remote_code)
    _reject_other_tokenizers(repository)
    if repository.has_modules:
        if not trust_remote_code:
            _reject_custom_activations(repository)
        plan = _from_modules(repository, st_config)
    elif kind not in ("dense", "bge-m3"):
        plan = PipelinePlan(
            layout="transformers", prompts=_prompts(st_config), default_prompt=_default_prompt(st_config)
        )
    elif section is not None:
        plan = _from_modelscope(repository, section, spec.pooling)
    elif "configuration.json" not in repository.files and any(
        _GTE_NAME.search(name) for name in (repository.name, spec.name)
    ):
        note = "no modules.json and no configuration.json: cls pooling and normalization, by the GTE name"
        plan = _bare_plan(config, pooling="cls", normalize=True, note=note)
    else:
        note = (
            f"{_GUESS_NOTE}: sentence-transformers' guess is used (last "
            "token for a causal language model, mean for all others; not normalized). If the model's card says "
            f"otherwise, set {POOLING_ADVICE}"
        )
        plan = _bare_plan(config, pooling=None, normalize=False, note=note)
        if spec.pooling is not None and spec.normalize is not None:
            plan = replace(plan, notes=())
    plan = replace(
        plan,
        kind=kind,
        route=spec.route,
        architecture=architecture_of(config) if spec.pooling is None else None,
        notes=(*plan.notes, *_notes_on_files(repository, trust_remote_code)),
    )
    return _apply_overrides(plan, spec)


def is_warning(note: str) -> bool:
    """Return whether a note of a plan needs the attention of the operator, or is only information."""
    return note.startswith(_WARNINGS)


def modelscope_model_section(configuration: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the `model` section of ModelScope's `configuration.json`, or None if it is not for sentence embedding."""
    names = modelscope_tasks(configuration)
    section = _section(configuration)
    if not names and "emb_pooler_type" in section:
        return section
    return section if "sentence-embedding" in names else None


def modelscope_tasks(configuration: Mapping[str, Any]) -> set[str]:
    """Return the tasks that ModelScope's `configuration.json` declares, in lower case and with hyphens."""
    section = _section(configuration)
    declared = (configuration.get("task"), configuration.get("tasks"), section.get("task"), section.get("tasks"))
    names = {name for task in declared for name in _task_names(task)}
    return names or set(_task_names(configuration.get("pipeline")))


def _section(configuration: Mapping[str, Any]) -> Mapping[str, Any]:
    model = configuration.get("model")
    return model if isinstance(model, dict) else {}


def _declared_dimension(modules: list[dict[str, Any]], config: Mapping[str, Any]) -> int | None:
    for module in reversed(modules):
        for name in ("out_features", "word_embedding_dimension", "embedding_dimension"):
            if isinstance(width := module.get(name), int):
                return width
    width = config.get("hidden_size") or config.get("dim") or config.get("d_model")
    return width if isinstance(width, int) else None


def _declared_pooling(modules: list[dict[str, Any]]) -> str | None:
    for module in modules:
        if isinstance(mode := module.get("pooling_mode"), str):
            return mode
        modes = [
            name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for name, value in module.items()
            if name.startswith("pooling_mode_") and value is True
        ]
        if modes:
            return "+".join(modes)
    return None


def _from_modules(repository: Repository, st_config: Mapping[str, Any]) -> PipelinePlan:
    truncate_dim = st_config.get("truncate_dim")
    notes: list[str] = []
    if "modules.json" not in repository.files and repository.config.get("model_type") != "model2vec":
        folders = ", ".join(str(module["path"]) for module in repository.modules[1:])
        notes.append(
            f"{_FOLDERS_NOTE}: its modules are read from the folders {folders}. Whether its vectors are normalized is not "
            f"known: if the model's card says so, set {POOLING_ADVICE}"
        )
    if truncate_dim is not None:
        notes.append(
            f"vectors are cut to {truncate_dim} values after the model's last step (truncate_dim), as "
            "sentence-transformers does, so a normalized model's vectors are shorter than 1; set the key "
            '"normalize" of this model in EMB_PROVIDER_MODEL_MAPPING to true to have length 1'
        )
    return PipelinePlan(
        layout="sentence-transformers",
        prompts=_prompts(st_config),
        default_prompt=_default_prompt(st_config),
        truncate_dim=truncate_dim if isinstance(truncate_dim, int) else None,
        matryoshka=_matryoshka(repository.config) or _matryoshka(st_config),
        notes=tuple(notes),
    )


def _prompts(st_config: Mapping[str, Any]) -> dict[str, str]:
    return {name: text for name, text in (st_config.get("prompts") or {}).items() if text is not None}


def _default_prompt(st_config: Mapping[str, Any]) -> str | None:
    return st_config.get("default_prompt_name")


def _from_modelscope(
    repository: Repository, section: Mapping[str, Any], requested_pooling: Pooling | None
) -> PipelinePlan:
    # Only ModelScope's class for BLOOM defaults to a weighted mean.
    default = "weighted_mean" if section.get("type") == "bloom" else "cls"
    name = section.get("emb_pooler_type", default)
    pooling = requested_pooling or MODELSCOPE_POOLING.get(name)
    if pooling is None:
        raise UnsupportedModelError(
            f"{repository.name} requests the pooling {name!r} in its configuration.json, which is not "
            f"supported (supported: {', '.join(MODELSCOPE_POOLING)}). To use another pooling, set {POOLING_ADVICE}."
        )
    normalize = bool(section.get("normalize", False))
    note = (
        f"no modules.json: {pooling} pooling, {'normalized' if normalize else 'not normalized'}, "
        "by ModelScope's configuration.json"
    )
    plan = _bare_plan(repository.config, pooling=pooling, normalize=normalize, note=note)
    return replace(plan, layout="modelscope", max_length=MODELSCOPE_MAX_LENGTH)


def _bare_plan(config: Mapping[str, Any], *, pooling: Pooling | None, normalize: bool, note: str) -> PipelinePlan:
    return PipelinePlan(
        layout="transformers", pooling=pooling, normalize=normalize, matryoshka=_matryoshka(config), notes=(note,)
    )


def _apply_overrides(plan: PipelinePlan, spec: ModelSpec) -> PipelinePlan:
    values = {"pooling": spec.pooling, "normalize": spec.normalize, "max_length": spec.max_length}
    overrides: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    if overrides:
        note = f"set by the operator: {', '.join(f'{key}={value}' for key, value in overrides.items())}"
        overrides["notes"] = (*plan.notes, note)
    return replace(plan, prompts={**plan.prompts, **(spec.prompts or {})}, **overrides)


def _matryoshka(config: Mapping[str, Any]) -> tuple[int, ...] | Literal["any"] | None:
    for key in ("matryoshka_dimensions", "matryoshka_dims"):
        sizes = config.get(key)
        if isinstance(sizes, list) and sizes:
            return tuple(sorted({int(size) for size in sizes}))
    return "any" if config.get("is_matryoshka") is True else None


def _reject_custom_activations(repository: Repository) -> None:
    """Reject Dense modules whose activation function sentence-transformers would silently replace by Tanh."""
    for module in repository.nested_modules:
        if not str(module.get("type", "")).endswith(".Dense"):
            continue
        config = repository.read(f"{module['path']}/config.json")
        activation = str(config.get("activation_function", "torch."))
        if not activation.startswith("torch."):
            raise UnsupportedModelError(
                f"{repository.name} uses the activation function {activation!r}, which is not part of PyTorch. "
                f"{TRUST_ADVICE}"
            )


def _reject_other_tokenizers(repository: Repository) -> None:
    """Reject models with a tokenizer in another repository, because it is not in the verified snapshot."""
    for path in sorted(repository.files):
        name = path.rpartition("/")[2]
        if name.startswith("sentence_") and name.endswith("_config.json"):
            tokenizer = repository.read(path).get("tokenizer_name_or_path")
            if tokenizer:
                raise UnsupportedModelError(
                    f"{repository.name} uses the tokenizer of {tokenizer!r} ({path}). Save the model with "
                    "its own tokenizer, and serve that directory."
                )


def _notes_on_files(repository: Repository, trust_remote_code: bool) -> Iterator[str]:
    legacy = any(path.endswith(".bin") and "pytorch_model" in path for path in repository.files)
    if legacy and not any(path.endswith(".safetensors") for path in repository.files):
        yield (
            f"{_BIN_NOTE}: read with PyTorch's weights-only loader, which runs no code from them; "
            "prefer a revision with safetensors"
        )
    if unused := _unused_folders(repository):
        yield f"weights that no module uses, because modules.json does not list their folders: {', '.join(unused)}"
    if repository.base is not None:
        yield f"a LoRA adapter, merged into its base model {repository.base}"
    if trust_remote_code:
        yield f"{_CODE_NOTE}: code from the repository runs inside this service"
        for other in sorted(repository.code):
            yield f"{_OTHER_CODE_NOTE}: {other}"


def _unused_folders(repository: Repository) -> list[str]:
    """Return the folders with weights that no module of `modules.json` has, such as a Dense for another size."""
    if not repository.has_modules:
        return []
    used = {str(module["path"]) for module in repository.nested_modules}
    folders = {split_path(path)[0].rstrip("/") for path in repository.files if is_weights(path)}
    return sorted(folder for folder in folders if not any(folder == path or not folder for path in used))


def _task_names(task: object) -> Iterator[str]:
    """Yield the names in a task, which can be a string, a list, or an object with a name or a type."""
    if isinstance(task, str):
        yield task.strip().lower().replace("_", "-")
    elif isinstance(task, list):
        for item in task:
            yield from _task_names(item)
    elif isinstance(task, dict):
        for key in ("name", "type", "task"):
            yield from _task_names(task.get(key))
