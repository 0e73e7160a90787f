"""The kind of a model, and whether its class would be loaded, are recognized by its files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import UnsupportedModelError
from tests.backends.test_pipeline_plan import GTE, plan_of

if TYPE_CHECKING:
    from pathlib import Path

ST = "config_sentence_transformers.json"
CARD = "---\nlicense: mit\npipeline_tag: {task}\ntags:\n- {tag}\n---\n# A model\n"


def architecture(name: str, **config: Any) -> dict[str, Any]:
    return {"config.json": {"model_type": "bert", "architectures": [name], **config}}


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "cross-encoder": (
        {**architecture("BertForSequenceClassification", num_labels=1), ST: {"model_type": "CrossEncoder"}},
        "reranker",
    ),
    "cross-encoder with labels": (
        {**architecture("BertForSequenceClassification"), ST: {"model_type": "CrossEncoder"}},
        "classifier",
    ),
    "sparse encoder": ({"config.json": {}, ST: {"model_type": "SparseEncoder"}}, "sparse"),
    "multi-vector encoder": ({"config.json": {}, ST: {"model_type": "MultiVectorEncoder"}}, "multi-vector"),
    "PyLate": ({"config.json": {}, ST: {"model_type": "ColBERT"}}, "multi-vector"),
    "reranker": (architecture("BertForSequenceClassification", num_labels=1), "reranker"),
    "reranker by its labels": (architecture("BertForSequenceClassification", id2label={"0": "L"}), "reranker"),
    "cross-encoder of sentence-transformers 4": (
        architecture("BertForSequenceClassification", sentence_transformers={"version": "4.0.1"}, num_labels=1),
        "reranker",
    ),
    "classifier": (architecture("XLMRobertaForSequenceClassification"), "classifier"),
    "ColBERT": (architecture("HF_ColBERT"), "multi-vector"),
    "language model with LogitScore": (
        {
            **architecture("Qwen3ForCausalLM"),
            "modules.json": [
                {"type": "sentence_transformers.cross_encoder.modules.LogitScore", "path": "1_LogitScore"}
            ],
        },
        "reranker",
    ),
    "SPLADE modules": (
        {
            **architecture("BertForMaskedLM"),
            "modules.json": [{"type": "sentence_transformers.sparse_encoder.models.SpladePooling", "path": "1_Splade"}],
        },
        "sparse",
    ),
    "PyLate modules": (
        {"config.json": {}, "modules.json": [{"type": "pylate.models.Dense.Dense", "path": "1_Dense"}]},
        "multi-vector",
    ),
    "SPLADE by its card": (
        {**architecture("BertForMaskedLM"), "README.md": CARD.format(task="feature-extraction", tag="splade")},
        "sparse",
    ),
    "reranker by its card": (
        {**architecture("Qwen3ForCausalLM"), "README.md": CARD.format(task="text-ranking", tag="qwen")},
        "reranker",
    ),
    "BGE-M3": (
        {
            **architecture("XLMRobertaModel"),
            "modules.json": [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}],
            "sparse_linear.pt": "",
            "colbert_linear.pt": "",
        },
        "bge-m3",
    ),
}
OTHER_KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"config.json": {}, ST: {"model_type": "Oracle"}}, "a Oracle"),
    "token classifier": (architecture("BertForTokenClassification"), "a token classifier"),
    "question answering": (architecture("BertForQuestionAnswering"), "a model that answers questions"),
    "pages": (architecture("ColPaliForRetrieval"), "a multi-vector model of images"),
    "sparse autoencoder": (
        {
            **architecture("BertModel"),
            "modules.json": [{"type": "sentence_transformers.sparse_encoder.models.SparseAutoEncoder", "path": "1_S"}],
        },
        "a sparse autoencoder",
    ),
    "reranker without a head on ModelScope": (
        {**architecture("BertModel"), "configuration.json": {"task": "text-ranking"}},
        "a model for reranking by its description",
    ),
    "classifier without a head on ModelScope": (
        {"config.json": {}, "configuration.json": {"task": "text_classification"}},
        "a model for classification by its description",
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_the_kind_is_recognized_by_the_files(case: str, tmp_path: Path) -> None:
    files, kind = KINDS[case]
    assert plan_of(tmp_path, {"modules.json": [], **files} if ST in files else files).kind == kind


def test_a_language_model_is_a_reranker_by_its_name(tmp_path: Path) -> None:
    """As Qwen3-Reranker without its card. Its last token vector would be no embedding."""
    files = architecture("Qwen3ForCausalLM")
    assert plan_of(tmp_path / "a", files, repository="Qwen/Qwen3-Reranker-0.6B").kind == "reranker"
    assert plan_of(tmp_path / "b", files, repository="Qwen/Qwen3-Embedding-0.6B").kind == "dense"
    assert plan_of(tmp_path / "c", architecture("BertModel"), repository="someone/for-reranking").kind == "dense"


@pytest.mark.parametrize("case", OTHER_KINDS)
def test_another_kind_of_model_is_an_error(case: str, tmp_path: Path) -> None:
    """sentence-transformers would average its token vectors. The message says what it is and what to do."""
    files, what = OTHER_KINDS[case]
    with pytest.raises(UnsupportedModelError, match=f"^someone/model is {what}.*(Choose|kind)"):
        plan_of(tmp_path, {"modules.json": [], **files} if ST in files else files)


REQUESTED: dict[str, tuple[dict[str, Any], str]] = {
    "dense, whatever the card says": (
        {**architecture("BertModel"), "README.md": CARD.format(task="text-classification", tag="x")},
        "dense",
    ),
    "language model": (architecture("Qwen3ForCausalLM"), "reranker"),
    "classifier with one label": (architecture("BertForSequenceClassification", num_labels=1), "classifier"),
    "masked language model": (architecture("BertForMaskedLM"), "sparse"),
}


@pytest.mark.parametrize("case", REQUESTED)
def test_the_settings_override_the_kind(case: str, tmp_path: Path) -> None:
    files, kind = REQUESTED[case]
    assert plan_of(tmp_path, files, kind=kind).kind == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("BertForSequenceClassification", "dense"),
        ("BertModel", "reranker"),
        ("BertModel", "sparse"),
        ("BertModel", "multi-vector"),
        ("BertModel", "bge-m3"),
    ],
)
def test_a_kind_that_the_files_cannot_be_is_an_error(name: str, kind: str, tmp_path: Path) -> None:
    """A reranker or classifier is never averaged into something like an embedding."""
    with pytest.raises(UnsupportedModelError, match=f"cannot be served as the kind '{kind}'.*{name}.*MODEL_MAPPING"):
        plan_of(tmp_path, architecture(name), kind=kind)


def test_modules_make_a_classifier_an_embedding_model(tmp_path: Path) -> None:
    """The class of the checkpoint that an embedding model was trained from does not matter."""
    pooling = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
    plan = plan_of(tmp_path, {**architecture("BertForSequenceClassification"), "modules.json": [pooling]})
    assert plan.layout == "sentence-transformers"


def test_modelscope_can_declare_a_classifier_as_an_embedding_model(tmp_path: Path) -> None:
    assert plan_of(tmp_path, {**architecture("BertForMaskedLM"), "configuration.json": GTE}).layout == "modelscope"


def test_a_bare_masked_language_model_is_an_error(tmp_path: Path) -> None:
    """It can be SPLADE, which has no other sign in a directory. The message names the keys that allow both."""
    with pytest.raises(UnsupportedModelError, match=r"BertForMaskedLM.*SPLADE.*EMB_PROVIDER_MODEL_MAPPING"):
        plan_of(tmp_path / "a", architecture("BertForMaskedLM"))
    assert plan_of(tmp_path / "b", architecture("BertForMaskedLM"), pooling="mean").pooling == "mean"


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors"])
def test_quantized_weights_are_an_error(method: str, tmp_path: Path) -> None:
    """The message names the method, and the setting that quantizes here."""
    config = architecture("BertModel", quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=rf"{method.upper()}.*EMB_PROVIDER_MODEL_PRECISION"):
        plan_of(tmp_path, config)


# --- classes of the repository ------------------------------------------------------------------------------------

OWN_CLASSES: dict[str, dict[str, Any]] = {
    "model": architecture("BertModel", auto_map={"AutoModel": "modeling.BertModel"}),
    "configuration": architecture("BertModel", auto_map={"AutoConfig": "configuration.Config"}),
    "model of another repository": architecture(
        "JinaBertModel", auto_map={"AutoModel": "o/code--modeling.JinaBertModel"}
    ),
    "tokenizer": {
        **architecture("BertModel"),
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "tokenization.Own"]}},
    },
    "module": {"config.json": {}, "modules.json": [{"path": "", "type": "custom_st.Transformer"}]},
    "module next to an adopted type": {
        "config.json": {"model_type": "jina_embeddings_v3"},
        "modules.json": [{"path": "", "type": "custom_st.Transformer"}],
    },
}


@pytest.mark.parametrize("case", OWN_CLASSES)
def test_an_own_class_is_an_error_unless_it_is_trusted(case: str, tmp_path: Path) -> None:
    """transformers would silently load its own class. The message names the setting."""
    with pytest.raises(UnsupportedModelError, match="EMB_PROVIDER_TRUST_REMOTE_CODE=true"):
        plan_of(tmp_path / "a", OWN_CLASSES[case])
    assert plan_of(tmp_path / "b", OWN_CLASSES[case], code=("o/code",), trust=True).layout


def test_an_adopted_model_type_needs_no_trust(tmp_path: Path) -> None:
    """transformers has the class now, and the reference to the code is only for older versions."""
    config = {"model_type": "nomic_bert", "auto_map": {"AutoModel": "nomic-ai/code--modeling.NomicBertModel"}}
    assert plan_of(tmp_path, {"config.json": config, "modules.json": []}).layout == "sentence-transformers"


def test_the_class_of_a_kind_needs_trust(tmp_path: Path) -> None:
    config = architecture(
        "NewForSequenceClassification",
        num_labels=1,
        auto_map={"AutoModelForSequenceClassification": "modeling.NewForSequenceClassification"},
    )
    with pytest.raises(UnsupportedModelError, match="EMB_PROVIDER_TRUST_REMOTE_CODE=true"):
        plan_of(tmp_path, config)


def test_classes_for_other_tasks_do_not_matter(tmp_path: Path) -> None:
    """Only the base class computes token vectors."""
    config = architecture("BertModel", auto_map={"AutoModelForSequenceClassification": "modeling.Classifier"})
    assert plan_of(tmp_path, {**config, "modules.json": []}).layout == "sentence-transformers"


def test_a_class_of_a_router_is_an_error_unless_it_is_trusted(tmp_path: Path) -> None:
    """Like one in modules.json."""
    router = {"structure": {"query": ["q"]}, "types": {"q": "own.Table"}}
    files = {
        "modules.json": [{"path": "", "type": "sentence_transformers.models.Router"}],
        "router_config.json": router,
    }
    with pytest.raises(UnsupportedModelError, match=r"own\.Table"):
        plan_of(tmp_path, files)


# --- modules without modules.json ---------------------------------------------------------------------------------


def test_folders_of_modules_replace_a_missing_modules_json(tmp_path: Path) -> None:
    """The pooling is that of the folder, and not the guess of sentence-transformers. A warning says so."""
    plan = plan_of(tmp_path, {**architecture("BertModel"), "1_Pooling/config.json": {"pooling_mode_cls_token": True}})
    assert (plan.layout, plan.pooling, plan.normalize) == ("sentence-transformers", None, None)
    assert any("1_Pooling" in note and "EMB_PROVIDER_MODEL_MAPPING" in note for note in plan.notes)
