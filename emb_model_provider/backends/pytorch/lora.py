"""Merges a LoRA adapter into its base model, with PEFT."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

from emb_model_provider.backends.loading_options import require_safe_adapter
from emb_model_provider.backends.repository import read_object
from emb_model_provider.errors import LoadError, UnsupportedModelError
from emb_model_provider.snapshots.files import temporary_directory
from emb_model_provider.snapshots.weights import ADAPTER_CONFIG

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

    from emb_model_provider.backends.repository import Repository

_PREFIX = "base_model.model."
"""Beginning of the names of all weights in an adapter, before their names in the model that it was trained on."""


def merge_adapter(transformer: Transformer, repository: Repository) -> None:
    """Merge the adapter of a repository into the model that a transformer has loaded.

    Raises:
        UnsupportedModelError: It is not LoRA, changes the task of the model, or has options that must not be used.
        LoadError: Its weights do not fit the model.
    """
    require_safe_adapter(read_object(repository.adapter[ADAPTER_CONFIG]), f"{ADAPTER_CONFIG} of {repository.name}")
    with temporary_directory() as directory:
        for name, path in repository.adapter.items():
            (directory / name).symlink_to(path.absolute())
        config: Any = PeftConfig.from_pretrained(str(directory))
        weights = load_peft_weights(str(directory), device="cpu")
    if str(config.peft_type).rpartition(".")[2].lower() not in ("lora", "dora", "adalora", "loha", "lokr"):
        raise UnsupportedModelError(
            f"{repository.name} is an adapter of the type {config.peft_type}, which cannot be merged into its base "
            "model. Choose a LoRA adapter, or a complete model."
        )
    # Its task would select a class with a head for this task, and PEFT would look for the base model on a hub.
    config.task_type, config.base_model_name_or_path, config.inference_mode = None, None, True
    with warnings.catch_warnings(action="ignore"):  # of transformers, about names that PEFT uses
        model = PeftModel(transformer.model, config)
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    weights = _fit_names(weights, expected, getattr(transformer.model, "base_model_prefix", ""))
    missing, unknown = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
    if missing or unknown:
        problem = f"{len(unknown)} of its weights (such as {unknown[0]}) belong to no module of" if unknown else (
            f"{len(missing)} weights (such as {missing[0]}) are missing for"
        )  # fmt: skip
        raise LoadError(
            f"{repository.name} does not fit its base model {repository.base}: {problem} {type(transformer.model).__name__}. "
            "Merge the adapter into the model that it was trained on, and serve the result."
        )
    set_peft_model_state_dict(model, weights)
    transformer.model = model.merge_and_unload(safe_merge=True)


def _fit_names(weights: dict[str, Any], expected: set[str], prefix: str) -> dict[str, Any]:
    """Return the weights of an adapter, also if it was trained on a class that contains the loaded one, with a head."""
    longer = f"{_PREFIX}{prefix}."
    if prefix and not weights.keys() & expected and all(name.startswith(longer) for name in weights):
        return {f"{_PREFIX}{name.removeprefix(longer)}": value for name, value in weights.items()}
    return weights
