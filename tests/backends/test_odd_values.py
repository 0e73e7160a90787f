"""Odd values in the configuration files of a repository are LoadErrors that say what to do, and no errors of Python."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emb_model_provider.backends.pipeline_plan import declared_values, plan_pipeline
from emb_model_provider.backends.repository import Repository
from emb_model_provider.backends.routes import routes_of
from emb_model_provider.errors import LoadError
from emb_model_provider.model_spec import ModelSpec
from tests.backends.test_pipeline_plan import snapshot_with

if TYPE_CHECKING:
    from pathlib import Path

ST = "sentence_transformers.models"
FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": f"{ST}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{ST}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": f"{ST}.Dense"},
    ],
    "config_sentence_transformers.json": {
        "prompts": {"query": "q: "},
        "default_prompt_name": "query",
        "truncate_dim": 8,
        "model_type": "SentenceTransformer",
        "matryoshka_dimensions": [8],
        "matryoshka_dims": [8],
    },
    "config.json": {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 10,
        "id2label": {"0": "a"},
        "num_labels": 1,
        "auto_map": {"AutoModel": "modeling.Model"},
        "quantization_config": None,
        "max_position_embeddings": 9,
        "is_matryoshka": True,
    },
    "configuration.json": {
        "task": "sentence-embedding",
        "model": {"type": "bert", "emb_pooler_type": "cls", "normalize": True},
    },
    "sentence_bert_config.json": {"max_seq_length": 9, "do_lower_case": False, "tokenizer_name_or_path": None},
    "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode": "cls", "pooling_mode_cls_token": True},
    "2_Dense/config.json": {"in_features": 8, "out_features": 8, "activation_function": "torch.nn.Identity"},
}
ROUTER: dict[str, Any] = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": f"{ST}.Router"}],
    "router_config.json": {
        "structure": {"query": ["query_0"], "document": ["document_0"]},
        "types": {"query_0": f"{ST}.Transformer", "document_0": f"{ST}.Transformer"},
        "parameters": {
            "default_route": "query",
            "allow_empty_key": True,
            "route_mappings": {"('query', 'text')": "query"},
        },
    },
    "config.json": {"model_type": "bert"},
    "adapter_config.json": {"base_model_name_or_path": None, "task_type": "FEATURE_EXTRACTION"},
}
ODD = [
    0,
    -1,
    1.5,
    True,
    "",
    "x",
    "(",
    [],
    [[]],
    [None],
    ["x"],
    [0],
    {},
    {"x": None},
    {"": []},
    {"x": {"x": 1}},
    10**30,
    None,
]
PYTHON = (
    "object is not",
    "object has no",
    "Traceback",
    "unhashable",
    "KeyError",
    "TypeError",
    "must be str",
    "NoneType",
)


def read_all(directory: Path, files: dict[str, Any]) -> str:
    """Read a repository as far as it is read without torch; return the message of a LoadError, or an empty string."""
    snapshot = snapshot_with(directory, files, "someone/model")
    try:
        routes_of(Repository.of(snapshot))
        plan = plan_pipeline(ModelSpec(alias="m", name="m"), snapshot, trust_remote_code=False)
        declared_values(plan, snapshot)
    except LoadError as error:
        return error.message
    return ""


def cases() -> list[tuple[dict[str, Any], str, str | int]]:
    """Return each key of each file, with the files of its repository."""
    return [
        (files, name, key)
        for files in (FILES, ROUTER)
        for name, content in files.items()
        for key in (content if isinstance(content, dict) else range(len(content)))
    ]


@pytest.mark.parametrize(
    ("files", "name", "key"), cases(), ids=lambda value: str(value) if not isinstance(value, dict) else ""
)
def test_odd_values_are_load_errors(files: dict[str, Any], name: str, key: str | int, tmp_path: Path) -> None:
    """Each value of each file is replaced by odd ones."""
    for odd in ODD[:: 1 if isinstance(key, str) else 3]:
        content = json.loads(json.dumps(files[name]))
        content[key] = odd
        message = read_all(tmp_path, {**files, name: content})
        assert not any(word in message for word in PYTHON), message
        assert len(message) < 1000


@pytest.mark.parametrize(
    ("name", "key", "value", "phrase"),
    [
        (
            "config_sentence_transformers.json",
            "prompts",
            ["q: "],
            "prompts must be an object of strings, not an array of 1 items",
        ),
        ("config_sentence_transformers.json", "prompts", {"query": 5}, "prompts must be an object of strings"),
        ("config_sentence_transformers.json", "truncate_dim", 0, "truncate_dim must be a positive integer, not 0"),
        ("config_sentence_transformers.json", "truncate_dim", "8", "truncate_dim must be a positive integer, not '8'"),
        (
            "config_sentence_transformers.json",
            "matryoshka_dims",
            ["8"],
            "matryoshka_dims must be an array of positive integers",
        ),
        ("config_sentence_transformers.json", "default_prompt_name", 5, "default_prompt_name must be a string, not 5"),
        ("sentence_bert_config.json", "max_seq_length", -5, "max_seq_length must be a positive integer, not -5"),
        ("config.json", "architectures", {}, "architectures must be an array of strings"),
        ("2_Dense/config.json", "out_features", 0, "out_features must be a positive integer, not 0"),
    ],
)
def test_the_message_says_what_is_wrong(name: str, key: str, value: Any, phrase: str, tmp_path: Path) -> None:
    """It names the file, the key, what is expected, and what to do."""
    files = {file: content for file, content in FILES.items() if file != "configuration.json"}
    files["config.json"] = {"model_type": "bert", "architectures": ["BertModel"]}
    files[name] = {**files[name], key: value}
    message = read_all(tmp_path, files)
    assert f"{name} of someone/model: {phrase}" in message
    assert message.endswith("Correct the file, or choose another model.")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(cases()), JSON, st.booleans())
def test_no_value_raises_another_error(
    tmp_path: Path, case: tuple[dict[str, Any], str, str | int], value: Any, whole: bool
) -> None:
    """Any JSON value in the place of a value, or of a whole file."""
    files, name, key = case
    content = json.loads(json.dumps(files[name]))
    content[key] = value
    read_all(tmp_path, {**files, name: value if whole else content})


def test_deep_nesting_is_a_load_error(tmp_path: Path) -> None:
    for depth in (500, 100_000):
        assert (
            read_all(tmp_path, {**FILES, "configuration.json": '{"task": ' + "[" * depth + "]" * depth + "}"})
            is not None
        )
