"""Configuration files of a repository can pass only harmless options on to the libraries that load it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.backends.loading_options import has_nested_quantifiers, require_safe_adapter
from emb_model_provider.backends.pytorch.view import open_view
from emb_model_provider.backends.repository import Repository
from emb_model_provider.errors import UnsupportedModelError
from tests.models import snapshot_of

if TYPE_CHECKING:
    from pathlib import Path

BERT_CONFIG = "sentence_bert_config.json"


def passed_on(directory: Path, **files: Any) -> dict[str, Any]:
    """Return the contents of files as the libraries see them."""
    for name, values in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    snapshot = snapshot_of(directory)
    with open_view(Repository.of(snapshot), snapshot.digest) as view:
        return {name: json.loads((view / name).read_text()) for name in files}


@pytest.mark.parametrize("name", [BERT_CONFIG, "0_Transformer/sentence_roberta_config.json"])
@pytest.mark.parametrize(
    ("section", "options"),
    [
        ("model_kwargs", {"key_mapping": {"^(a+)+$": "x"}}),
        ("model_args", {"key_mapping": {"^(a+)+$": "x"}}),
        ("model_kwargs", {"subfolder": "../../other"}),
        ("model_kwargs", {"gguf_file": "/etc/passwd"}),
        ("processor_kwargs", {"tokenizer_file": "/etc/passwd"}),
        ("tokenizer_args", {"vocab_file": "/etc/passwd"}),
        ("config_kwargs", {"_from_pipeline": "x"}),
        ("config_args", {"use_cache": "yes"}),
        ("processor_kwargs", {"model_max_length": [1]}),
        ("model_kwargs", ["key_mapping"]),
    ],
)
def test_other_options_are_refused(name: str, section: str, options: Any, tmp_path: Path) -> None:
    """The message names the file and the option. Old names of the objects count, too."""
    with pytest.raises(UnsupportedModelError, match=rf"{section} of {name} of test/small.*(directory|file)\.$"):
        passed_on(tmp_path, **{name: {"max_seq_length": 9, section: options}})


def test_options_that_the_service_decides_are_omitted(tmp_path: Path) -> None:
    """The rest is unchanged."""
    values = {
        "max_seq_length": 9,
        "model_kwargs": {"add_pooling_layer": False, "attn_implementation": "evil/kernel", "weights_only": False},
        "processor_kwargs": {"model_max_length": 7, "trust_remote_code": True},
    }
    assert passed_on(tmp_path, **{BERT_CONFIG: values})[BERT_CONFIG] == {
        "max_seq_length": 9,
        "model_kwargs": {"add_pooling_layer": False},
        "processor_kwargs": {"model_max_length": 7},
    }


def test_kernels_and_paths_in_other_files_are_omitted(tmp_path: Path) -> None:
    """Of config.json, at any depth, and of tokenizer_config.json."""
    files = passed_on(
        tmp_path,
        **{
            "config.json": {
                "hidden_size": 4,
                "attn_implementation": "evil/kernel",
                "text_config": {"_attn_implementation": {"": "evil/kernel"}, "experts_implementation": "evil/kernel"},
                "other": {"attn_implementation": "sdpa"},
            },
            "tokenizer_config.json": {
                "tokenizer_file": "/etc/passwd",
                "init_inputs": ["/etc/passwd"],
                "pad_token": "x",
            },
        },
    )
    assert files["config.json"] == {"hidden_size": 4, "text_config": {}, "other": {"attn_implementation": "sdpa"}}
    assert files["tokenizer_config.json"] == {"pad_token": "x"}


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": r"(\w+)+$"},
        {"exclude_modules": ["query", "(a|aa)+b"]},
        {"rank_pattern": {"(x*)*y": 4}},
        {"alpha_pattern": {".*.*.*.*z": 4}},
        {"layers_pattern": "(.*){9}"},
        {"megatron_config": {"a": 1}},
        {"layer_replication": [[0, 10**9]]},
    ],
)
def test_patterns_of_an_adapter_must_be_simple(values: dict[str, Any]) -> None:
    """PEFT matches them with the names of all modules, with Python's backtracking search."""
    with pytest.raises(UnsupportedModelError, match=r"adapter_config\.json .*Merge the adapter"):
        require_safe_adapter(values, "adapter_config.json")


def test_usual_adapters_are_accepted() -> None:
    values = {
        "target_modules": r".*\.layers\.\d+\.(self_attn|mlp)\.(q_proj|v_proj|up_proj)",
        "exclude_modules": None,
        "rank_pattern": {"layer.0.query": 8},
        "alpha_pattern": {},
        "layers_pattern": ["layers"],
        "modules_to_save": ["classifier"],
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "auto_mapping": {"base_model_class": "BertModel", "parent_library": "transformers"},
    }
    require_safe_adapter(values, "adapter_config.json")


@pytest.mark.parametrize(
    ("pattern", "nested"),
    [
        ("(a+)+", True),
        ("(a|b)*", True),
        ("((ab)*c)+", True),
        (r"(\w+\.){2,}", True),
        ("(ab)+", False),
        ("(a+)(b+)", False),
        (r"\(a+\)+", False),
        ("([+*)])+", False),
        (r"([\]+])+", False),
        ("(a+)?", False),
    ],
)
def test_nested_quantifiers(pattern: str, nested: bool) -> None:
    assert has_nested_quantifiers(pattern) is nested
