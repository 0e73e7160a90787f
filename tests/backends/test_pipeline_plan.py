"""The pipeline that the configuration files of a repository declare, without weights and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.backends.pipeline_plan import is_warning, modelscope_model_section, plan_pipeline
from emb_model_provider.errors import LoadError, UnsupportedModelError
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.backends.pipeline_plan import PipelinePlan


def snapshot_with(directory: Path, files: dict[str, Any], repository: str) -> Snapshot:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    listed = [SnapshotFile(path=name, size=0, sha256="") for name in files]
    return Snapshot.of("local", repository, "local", directory, listed)


def plan_of(
    directory: Path,
    files: dict[str, Any],
    *,
    repository: str = "someone/model",
    code: tuple[str, ...] = (),
    trust: bool = False,
    **spec: Any,
) -> PipelinePlan:
    """Plan the pipeline of a repository with these files, and with a Python file in each repository of `code`."""
    snapshot = snapshot_with(directory, files, repository).with_dependencies(
        {name: snapshot_with(directory / name, {"modeling.py": ""}, name) for name in code}
    )
    return plan_pipeline(ModelSpec(alias="m", name="m", **spec), snapshot, trust_remote_code=trust)


GTE = {"task": "sentence-embedding", "model": {"type": "bert", "emb_pooler_type": "cls", "normalize": True}}


def test_modules_json_takes_precedence_over_configuration_json(tmp_path: Path) -> None:
    """As in sentence-transformers."""
    plan = plan_of(tmp_path, {"config.json": {}, "modules.json": [], "configuration.json": GTE})
    assert (plan.layout, plan.pooling, plan.normalize, plan.max_length) == ("sentence-transformers", None, None, None)


@pytest.mark.parametrize(
    ("declared", "pooling"),
    [("cls", "cls"), ("avg", "mean"), ("mean", "mean"), ("weighted_mean", "weightedmean"), ("last", "lasttoken")],
)
def test_modelscope_pooling_names(tmp_path: Path, declared: str, pooling: str) -> None:
    """`model.emb_pooler_type` is the pooling."""
    configuration = {"task": "sentence-embedding", "model": {"emb_pooler_type": declared, "normalize": True}}
    plan = plan_of(tmp_path, {"config.json": {}, "configuration.json": configuration})
    assert (plan.layout, plan.pooling, plan.normalize, plan.max_length) == ("modelscope", pooling, True, 512)


@pytest.mark.parametrize("declared", ["avg_top2", "avg_first_last", "cls_before_pooler"])
def test_an_unsupported_modelscope_pooling_is_an_error(tmp_path: Path, declared: str) -> None:
    """The message names it, and the setting that replaces it."""
    configuration = {"task": "sentence-embedding", "model": {"emb_pooler_type": declared}}
    with pytest.raises(UnsupportedModelError, match=rf"'{declared}'.*EMB_PROVIDER_MODEL_MAPPING"):
        plan_of(tmp_path, {"config.json": {}, "configuration.json": configuration})


def test_configured_pooling_replaces_an_unsupported_one(tmp_path: Path) -> None:
    configuration = {"task": "sentence-embedding", "model": {"emb_pooler_type": "avg_top2"}}
    plan = plan_of(tmp_path, {"config.json": {}, "configuration.json": configuration}, pooling="mean")
    assert plan.pooling == "mean"


@pytest.mark.parametrize("model", [{}, {"type": "bert"}, None])
def test_the_default_of_modelscope_is_cls_without_normalization(tmp_path: Path, model: object) -> None:
    """If configuration.json names only the task."""
    configuration = {"task": "sentence-embedding", **({} if model is None else {"model": model})}
    plan = plan_of(tmp_path, {"config.json": {}, "configuration.json": configuration})
    assert (plan.pooling, plan.normalize) == ("cls", False)


def test_the_default_of_modelscope_for_bloom_is_a_weighted_mean(tmp_path: Path) -> None:
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
    """A string, in a list, in an object, or the type of the pipeline."""
    assert modelscope_model_section(configuration) is not None


@pytest.mark.parametrize(
    "configuration",
    [{}, {"task": "fill-mask"}, {"task": "fill-mask", "pipeline": {"type": "sentence-embedding"}}, {"task": 3}],
)
def test_the_configuration_of_another_task_is_ignored(configuration: dict[str, Any]) -> None:
    assert modelscope_model_section(configuration) is None


@pytest.mark.parametrize("owner", ["damo", "iic"])
def test_a_gte_name_without_configuration_is_normalized_cls(tmp_path: Path, owner: str) -> None:
    """The name of the repository decides if configuration.json is missing."""
    repository = f"{owner}/nlp_gte_sentence-embedding_chinese-base"
    plan = plan_of(tmp_path, {"config.json": {}}, repository=repository)
    assert (plan.pooling, plan.normalize) == ("cls", True)


def test_a_directory_without_declarations_is_guessed_with_a_warning(tmp_path: Path) -> None:
    """The note names the keys that correct the guess."""
    plan = plan_of(tmp_path, {"config.json": {}})
    assert (plan.layout, plan.pooling, plan.normalize) == ("transformers", None, False)
    assert all(word in plan.notes[0] for word in ("pooling", "normalize", "EMB_PROVIDER_MODEL_MAPPING"))
    assert is_warning(plan.notes[0])


def test_there_is_no_guess_if_everything_is_configured(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"config.json": {}}, pooling="cls", normalize=True)
    assert (plan.pooling, plan.normalize) == ("cls", True)
    assert not any("guess" in note for note in plan.notes)


def test_settings_take_precedence_over_files(tmp_path: Path) -> None:
    """pooling, normalize, max_length and prompts. A note names them."""
    files = {
        "config.json": {},
        "modules.json": [],
        "config_sentence_transformers.json": {"prompts": {"query": "q: ", "document": "d: "}},
    }
    plan = plan_of(
        tmp_path, files, pooling="cls", normalize=False, max_length=99, prompts={"query": "Q: ", "extra": "e: "}
    )
    assert (plan.pooling, plan.normalize, plan.max_length) == ("cls", False, 99)
    assert plan.prompts == {"query": "Q: ", "document": "d: ", "extra": "e: "}
    assert plan.notes == ("set by the operator: pooling=cls, normalize=False, max_length=99",)


def test_prompts_and_truncate_dim_are_declared(tmp_path: Path) -> None:
    """In config_sentence_transformers.json."""
    declared = {"prompts": {"query": "q: ", "none": None}, "default_prompt_name": "query", "truncate_dim": 128}
    plan = plan_of(tmp_path, {"config.json": {}, "modules.json": [], "config_sentence_transformers.json": declared})
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
    """With the keys that repositories use."""
    assert plan_of(tmp_path, {"config.json": config, "modules.json": []}).matryoshka == sizes


def test_a_custom_activation_is_an_error_unless_it_is_trusted(tmp_path: Path) -> None:
    """sentence-transformers would silently replace it by Tanh."""
    files = {
        "config.json": {},
        "modules.json": [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
        "2_Dense/config.json": {"activation_function": "someone.code.Swish"},
    }
    with pytest.raises(UnsupportedModelError, match=r"someone\.code\.Swish"):
        plan_of(tmp_path, files)
    plan = plan_of(tmp_path, files, trust=True)
    assert any("trust_remote_code is on" in note for note in plan.notes)


def test_an_adapter_without_its_base_model_is_an_error(tmp_path: Path) -> None:
    """The message names the base model, or says that the adapter does not."""
    weights = {"adapter_model.safetensors": ""}
    with pytest.raises(UnsupportedModelError, match="'other/base'"):
        plan_of(tmp_path / "a", {"adapter_config.json": {"base_model_name_or_path": "other/base"}, **weights})
    with pytest.raises(UnsupportedModelError, match="does not name the base model"):
        plan_of(tmp_path / "b", {"adapter_config.json": {}, **weights})


def test_a_tokenizer_of_another_repository_is_an_error(tmp_path: Path) -> None:
    """It is not in the snapshot."""
    files = {
        "config.json": {},
        "modules.json": [],
        "0_Transformer/sentence_bert_config.json": {"tokenizer_name_or_path": "other/tokenizer"},
    }
    with pytest.raises(UnsupportedModelError, match="'other/tokenizer'"):
        plan_of(tmp_path, files)


def test_code_from_another_repository_is_noted(tmp_path: Path) -> None:
    """If remote code is trusted."""
    config = {"auto_map": {"AutoModel": "other/code--modeling.Model", "AutoConfig": "configuration.Config"}}
    files = {"config.json": config, "modules.json": [{"path": "", "type": "other/modules--custom.Transformer"}]}
    notes = plan_of(tmp_path, files, code=("other/code", "other/modules"), trust=True).notes
    assert any("other/code" in note for note in notes)
    assert any("other/modules" in note for note in notes)


def test_missing_code_of_another_repository_is_an_error(tmp_path: Path) -> None:
    """The message names the repository."""
    config = {"auto_map": {"AutoModel": "other/code--modeling.Model"}}
    with pytest.raises(UnsupportedModelError, match="other/code"):
        plan_of(tmp_path, {"config.json": config, "modules.json": []}, trust=True)


def test_bin_weights_without_safetensors_are_noted(tmp_path: Path) -> None:
    """If there are safetensors, `.bin` weights are not used."""
    only = plan_of(tmp_path, {"config.json": {}, "pytorch_model.bin": "x"})
    both = plan_of(tmp_path, {"config.json": {}, "pytorch_model.bin": "x", "model.safetensors": "x"})
    assert any(".bin" in note for note in only.notes)
    assert not any(".bin" in note for note in both.notes)


def test_folders_with_weights_that_no_module_uses_are_noted(tmp_path: Path) -> None:
    """Such as a Dense for another number of dimensions. It is information only."""
    modules = [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    files = {"config.json": {}, "modules.json": modules, "2_Dense/config.json": {}, "model.safetensors": ""}
    weights = {"2_Dense/model.safetensors": "", "2_Dense_256/model.safetensors": ""}
    (note,) = plan_of(tmp_path, {**files, **weights}).notes
    assert "2_Dense_256" in note
    assert not is_warning(note)


def test_files_outside_the_snapshot_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    assert plan_of(tmp_path, {"config.json": {}}).layout == "transformers"


@pytest.mark.parametrize("content", ["{}", "[1]", "not json"])
def test_an_invalid_modules_json_is_an_error(tmp_path: Path, content: str) -> None:
    """The message names the file."""
    with pytest.raises(LoadError, match=r"modules\.json"):
        plan_of(tmp_path, {"config.json": {}, "modules.json": content})


def test_an_invalid_configuration_json_is_an_error(tmp_path: Path) -> None:
    """The message names the file."""
    with pytest.raises(LoadError, match=r"configuration\.json"):
        plan_of(tmp_path, {"config.json": {}, "configuration.json": "{broken"})


def test_planning_does_not_import_torch() -> None:
    """The process that serves compiled models must not import it."""
    code = (
        "import sys, emb_model_provider.backends.pipeline_plan, emb_model_provider.backends.precision, "
        "emb_model_provider.backends.tokenization; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'sentence_transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- notes ------------------------------------------------------------------------------------------------------


def test_warnings_are_distinguished_from_information(tmp_path: Path) -> None:
    """Guesses, `.bin` weights and remote code need attention; declarations and settings do not."""
    config = {"auto_map": {"AutoModel": "other/code--modeling.Model"}}
    files = {"config.json": config, "pytorch_model.bin": "x"}
    warnings = plan_of(tmp_path / "a", files, code=("other/code",), trust=True).notes
    assert len(warnings) == 4
    assert all(map(is_warning, warnings))
    gte = "iic/nlp_gte_sentence-embedding_chinese-base"
    declared = {"truncate_dim": 8}
    information = (
        *plan_of(tmp_path / "b", {"config.json": {}, "configuration.json": GTE}, max_length=9).notes,
        *plan_of(tmp_path / "c", {"config.json": {}}, repository=gte).notes,
        *plan_of(
            tmp_path / "d", {"config.json": {}, "modules.json": [], "config_sentence_transformers.json": declared}
        ).notes,
    )
    assert len(information) == 4
    assert not any(map(is_warning, information))


def test_notes_are_unchanged(tmp_path: Path) -> None:
    """Their texts are part of the keys of artifacts: a change would compile all models again."""
    config = {"auto_map": {"AutoModel": "other/code--modeling.Model"}}
    files = {"config.json": config, "pytorch_model.bin": "x"}
    assert plan_of(tmp_path, files, code=("other/code",), trust=True).notes == (
        "the repository does not say how its vectors are made: sentence-transformers' guess is used (last token for a "
        "causal language model, mean for all others; not normalized). If the model's card says otherwise, set the keys "
        '"pooling" and "normalize" of this model in EMB_PROVIDER_MODEL_MAPPING',
        "only .bin weights: read with PyTorch's weights-only loader, which runs no code from them; prefer a revision "
        "with safetensors",
        "trust_remote_code is on: code from the repository runs inside this service",
        "the model takes code from another repository: other/code",
    )
