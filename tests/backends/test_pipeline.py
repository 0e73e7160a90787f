"""The rule table: what a directory's files say of its pipeline. No weights, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.backends.pipeline_plan import modelscope_model_section, plan_pipeline
from emb_model_provider.errors import LoadError, UnsupportedModelError
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.backends.pipeline_plan import PipelinePlan


def plan_of(
    directory: Path,
    files: dict[str, Any],
    *,
    repository: str = "someone/model",
    trust: bool = False,
    **spec: Any,
) -> PipelinePlan:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    snapshot = Snapshot(
        hub="local",
        repository=repository,
        revision="local",
        path=directory,
        files=tuple(SnapshotFile(path=name, size=0, sha256="") for name in files),
        digest="",
    )
    return plan_pipeline(ModelSpec(alias="m", name="m", **spec), snapshot, trust_remote_code=trust)


GTE = {"task": "sentence-embedding", "model": {"type": "bert", "emb_pooler_type": "cls", "normalize": True}}


def test_modules_json_wins_over_modelscopes_configuration(tmp_path: Path) -> None:
    """A directory with modules.json is read as sentence-transformers reads it, whatever else lies there."""
    plan = plan_of(tmp_path, {"config.json": {}, "modules.json": [], "configuration.json": GTE})
    assert (plan.layout, plan.pooling, plan.normalize, plan.max_length) == (
        "sentence-transformers",
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("declared", "pooling"),
    [
        ("cls", "cls"),
        ("avg", "mean"),
        ("mean", "mean"),
        ("weighted_mean", "weightedmean"),
        ("last", "lasttoken"),
    ],
)
def test_modelscope_pooling_names(tmp_path: Path, declared: str, pooling: str) -> None:
    """`model.emb_pooler_type` chooses the pooling."""
    configuration = {"task": "sentence-embedding", "model": {"emb_pooler_type": declared, "normalize": True}}
    plan = plan_of(tmp_path, {"config.json": {}, "configuration.json": configuration})
    assert (plan.layout, plan.pooling, plan.normalize, plan.max_length) == ("modelscope", pooling, True, 512)


@pytest.mark.parametrize("declared", ["avg_top2", "avg_first_last", "cls_before_pooler"])
def test_a_modelscope_pooling_that_is_not_supported_is_refused_by_name(tmp_path: Path, declared: str) -> None:
    """Poolings over several layers are refused, and the message names them and the way out."""
    configuration = {"task": "sentence-embedding", "model": {"emb_pooler_type": declared}}
    with pytest.raises(UnsupportedModelError, match=rf"'{declared}'.*EMB_PROVIDER_MODEL_MAPPING"):
        plan_of(tmp_path, {"config.json": {}, "configuration.json": configuration})


def test_the_operators_pooling_replaces_one_that_is_not_supported(tmp_path: Path) -> None:
    """The mapping's pooling wins over a declared one, supported or not."""
    configuration = {"task": "sentence-embedding", "model": {"emb_pooler_type": "avg_top2"}}
    plan = plan_of(tmp_path, {"config.json": {}, "configuration.json": configuration}, pooling="mean")
    assert plan.pooling == "mean"


@pytest.mark.parametrize("model", [{}, {"type": "bert"}, None])
def test_modelscope_without_keys_is_cls_and_not_normalized(tmp_path: Path, model: object) -> None:
    """Where configuration.json names the task alone, pooling is cls and vectors keep their length."""
    configuration = {"task": "sentence-embedding", **({} if model is None else {"model": model})}
    plan = plan_of(tmp_path, {"config.json": {}, "configuration.json": configuration})
    assert (plan.pooling, plan.normalize) == ("cls", False)


def test_modelscopes_bloom_models_default_to_a_weighted_mean(tmp_path: Path) -> None:
    """ModelScope's BLOOM class has a default of its own."""
    configuration = {"task": "sentence-embedding", "model": {"type": "bloom"}}
    plan = plan_of(tmp_path, {"config.json": {}, "configuration.json": configuration})
    assert plan.pooling == "weightedmean"


@pytest.mark.parametrize(
    "configuration",
    [
        {"task": "sentence-embedding"},
        {"task": "Sentence_Embedding"},
        {"task": ["fill-mask", "sentence-embedding"]},
        {"tasks": [{"name": "sentence-embedding"}]},
        {"task": {"name": "sentence-embedding"}},
        {"model": {"task": "sentence-embedding"}},
        {"pipeline": {"type": "sentence_embedding"}},
        {"model": {"emb_pooler_type": "cls"}},
    ],
)
def test_spellings_of_the_sentence_embedding_task(configuration: dict[str, Any]) -> None:
    """The task is found as a string, in a list, in an object, or as the pipeline's type."""
    assert modelscope_model_section(configuration) is not None


@pytest.mark.parametrize(
    "configuration",
    [
        {},
        {"task": "fill-mask"},
        {"task": "fill-mask", "pipeline": {"type": "sentence-embedding"}},
        {"task": 3},
    ],
)
def test_another_task_is_not_read_as_sentence_embedding(configuration: dict[str, Any]) -> None:
    """A configuration.json for another task does not decide the pooling."""
    assert modelscope_model_section(configuration) is None


@pytest.mark.parametrize("owner", ["damo", "iic"])
def test_a_gte_name_without_configuration_is_cls_and_normalized(tmp_path: Path, owner: str) -> None:
    """ModelScope's GTE repositories are known by name where the file that says so is missing."""
    repository = f"{owner}/nlp_gte_sentence-embedding_chinese-base"
    plan = plan_of(tmp_path, {"config.json": {}}, repository=repository)
    assert (plan.pooling, plan.normalize) == ("cls", True)


def test_a_directory_that_says_nothing_is_guessed_with_a_warning(tmp_path: Path) -> None:
    """The guess is sentence-transformers' own, not normalized, and the note names the keys that correct it."""
    plan = plan_of(tmp_path, {"config.json": {}})
    assert (plan.layout, plan.pooling, plan.normalize) == ("transformers", None, False)
    assert all(word in plan.notes[0] for word in ("pooling", "normalize", "EMB_PROVIDER_MODEL_MAPPING"))


def test_no_warning_where_the_operator_has_said_all(tmp_path: Path) -> None:
    """Nothing is guessed once the mapping gives pooling and normalization."""
    plan = plan_of(tmp_path, {"config.json": {}}, pooling="cls", normalize=True)
    assert (plan.pooling, plan.normalize) == ("cls", True)
    assert not any("guess" in note for note in plan.notes)


def test_the_operators_word_wins_over_all_files(tmp_path: Path) -> None:
    """pooling, normalize, max_length and prompts of the mapping stand over those of the repository."""
    files = {
        "config.json": {},
        "modules.json": [],
        "config_sentence_transformers.json": {"prompts": {"query": "q: ", "document": "d: "}},
    }
    plan = plan_of(
        tmp_path,
        files,
        pooling="cls",
        normalize=False,
        max_length=99,
        prompts={"query": "Q: ", "extra": "e: "},
    )
    assert (plan.pooling, plan.normalize, plan.max_length) == ("cls", False, 99)
    assert plan.prompts == {"query": "Q: ", "document": "d: ", "extra": "e: "}


def test_prompts_and_truncate_dim_are_declared(tmp_path: Path) -> None:
    """config_sentence_transformers.json gives prompts, the default prompt and truncate_dim."""
    declared = {
        "prompts": {"query": "q: ", "none": None},
        "default_prompt_name": "query",
        "truncate_dim": 128,
    }
    plan = plan_of(
        tmp_path, {"config.json": {}, "modules.json": [], "config_sentence_transformers.json": declared}
    )
    assert (plan.prompts, plan.default_prompt, plan.truncate_dim) == ({"query": "q: "}, "query", 128)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"matryoshka_dimensions": [512, 64, 128]}, (64, 128, 512)),
        ({"matryoshka_dims": [64]}, (64,)),
        ({"is_matryoshka": True}, "any"),
        ({"is_matryoshka": False}, None),
        ({}, None),
    ],
)
def test_matryoshka_dimensions_are_declared(tmp_path: Path, config: dict[str, Any], sizes: object) -> None:
    """The spellings that repositories use for the sizes their vectors can be cut to."""
    assert plan_of(tmp_path, {"config.json": config, "modules.json": []}).matryoshka == sizes


@pytest.mark.parametrize("model_type", ["SparseEncoder", "CrossEncoder", "MultiVectorEncoder"])
def test_a_model_of_another_kind_is_refused(tmp_path: Path, model_type: str) -> None:
    """sentence-transformers would turn it into a mean-pooled model that nobody trained."""
    declared = {"model_type": model_type}
    with pytest.raises(UnsupportedModelError, match=model_type):
        plan_of(
            tmp_path, {"config.json": {}, "modules.json": [], "config_sentence_transformers.json": declared}
        )


def test_an_activation_from_outside_torch_is_refused_unless_trusted(tmp_path: Path) -> None:
    """sentence-transformers would silently put Tanh in its place."""
    files = {
        "config.json": {},
        "modules.json": [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
        "2_Dense/config.json": {"activation_function": "someone.code.Swish"},
    }
    with pytest.raises(UnsupportedModelError, match=r"someone\.code\.Swish"):
        plan_of(tmp_path, files)
    plan = plan_of(tmp_path, files, trust=True)
    assert any("trust_remote_code is on" in note for note in plan.notes)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    """An adapter's base model lies in another repository."""
    with pytest.raises(UnsupportedModelError, match="'other/base'"):
        plan_of(tmp_path, {"adapter_config.json": {"base_model_name_or_path": "other/base"}})


def test_a_tokenizer_from_elsewhere_is_refused(tmp_path: Path) -> None:
    """A tokenizer named by another repository is not in the snapshot."""
    files = {
        "config.json": {},
        "modules.json": [],
        "0_Transformer/sentence_bert_config.json": {"tokenizer_name_or_path": "other/tokenizer"},
    }
    with pytest.raises(UnsupportedModelError, match="'other/tokenizer'"):
        plan_of(tmp_path, files)


def test_code_from_another_repository_is_noted(tmp_path: Path) -> None:
    """With remote code trusted, the operator is told that the code is not part of the snapshot."""
    config = {"auto_map": {"AutoModel": "other/code--modeling.Model", "AutoConfig": "configuration.Config"}}
    modules = [{"path": "", "type": "other/modules--custom.Transformer"}]
    notes = plan_of(tmp_path, {"config.json": config, "modules.json": modules}, trust=True).notes
    assert any("other/code" in note for note in notes)
    assert any("other/modules" in note for note in notes)


def test_bin_weights_alone_are_noted(tmp_path: Path) -> None:
    """Weights in `.bin` are allowed, with a warning; beside safetensors they are not used."""
    only = plan_of(tmp_path, {"config.json": {}, "pytorch_model.bin": "x"})
    both = plan_of(tmp_path, {"config.json": {}, "pytorch_model.bin": "x", "model.safetensors": "x"})
    assert any(".bin" in note for note in only.notes)
    assert not any(".bin" in note for note in both.notes)


def test_files_outside_the_manifest_are_not_read(tmp_path: Path) -> None:
    """A modules.json that the snapshot does not name does not exist."""
    (tmp_path / "modules.json").write_text("[]")
    assert plan_of(tmp_path, {"config.json": {}}).layout == "transformers"


@pytest.mark.parametrize("content", ["{}", "[1]", "not json"])
def test_a_broken_modules_json_is_a_load_error(tmp_path: Path, content: str) -> None:
    """The message names the file."""
    with pytest.raises(LoadError, match=r"modules\.json"):
        plan_of(tmp_path, {"config.json": {}, "modules.json": content})


def test_a_broken_configuration_is_a_load_error(tmp_path: Path) -> None:
    """The message names the file."""
    with pytest.raises(LoadError, match=r"configuration\.json"):
        plan_of(tmp_path, {"config.json": {}, "configuration.json": "{broken"})


def test_reading_a_plan_does_not_import_torch() -> None:
    """The light serving process reads plans and precisions without a runtime."""
    code = (
        "import sys, emb_model_provider.backends.pipeline_plan, emb_model_provider.backends.precision, "
        "emb_model_provider.backends.pytorch.backend, emb_model_provider.backends.tokenization; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'sentence_transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
