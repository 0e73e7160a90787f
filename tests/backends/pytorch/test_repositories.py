"""Repositories as they are found: what their files say is used or rejected, and nothing else is read."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.errors import LoadError, UnsupportedModelError
from tests.backends.helpers import TEXTS, cosines, embed_texts, load_torch, reference
from tests.backends.small_tokenizers import byte_bpe, wordpiece
from tests.models import bert, qwen3, save_bare, snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from emb_model_provider.snapshots.snapshot import Snapshot


def edit(path: Path, **values: Any) -> None:
    contents = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**contents, **values}))


def load(snapshot: Snapshot, *, trust: bool = False, **spec: Any) -> TorchBackend:
    return TorchBackend(spec_of(**spec), snapshot, trust_remote_code=trust)


def encode(directory: Path) -> NDArray[np.float32]:
    """Return the vectors of sentence-transformers."""
    return np.asarray(reference(directory).encode(TEXTS, show_progress_bar=False))


def assert_vectors(backend: TorchBackend, expected: NDArray[np.float32]) -> None:
    assert cosines(embed_texts(backend, TEXTS), expected).min() >= 0.99999


@pytest.fixture
def st_directory(tmp_path: Path, family_directory: Callable[[str], Path]) -> Path:
    return Path(shutil.copytree(family_directory("bert-cls"), tmp_path / "model"))


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers keep the code of repositories in a directory of the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_that_are_not_in_the_snapshot_are_not_read(st_directory: Path) -> None:
    """Such as an adapter of an experiment, or the index of shards that do not exist."""
    expected, snapshot = encode(st_directory), snapshot_of(st_directory)
    edit(st_directory / "adapter_config.json", base_model_name_or_path="owner/base", peft_type="LORA")
    edit(st_directory / "model.safetensors.index.json", weight_map={"a": "model-00001-of-00002.safetensors"})
    edit(st_directory / "preprocessor_config.json", image_processor_type="CLIPImageProcessor")
    assert_vectors(load(snapshot), expected)


def test_weights_at_another_precision_are_read_if_there_are_no_others(st_directory: Path) -> None:
    """`model.fp16.safetensors`, which transformers reads on request only."""
    expected = encode(st_directory)
    weights = st_directory / "model.safetensors"
    weights.rename(weights.with_name("model.fp16.safetensors"))
    assert_vectors(load(snapshot_of(st_directory)), expected)


def test_weights_at_another_precision_are_not_read_beside_the_plain_ones(st_directory: Path) -> None:
    expected = encode(st_directory)
    zeros = {name: torch.zeros_like(value) for name, value in load_file(st_directory / "model.safetensors").items()}
    save_file(zeros, st_directory / "model.fp16.safetensors", {"format": "pt"})
    assert_vectors(load(snapshot_of(st_directory)), expected)


def test_folders_of_modules_are_used_without_modules_json(st_directory: Path) -> None:
    """The pooling of `1_Pooling` is cls. sentence-transformers would use the mean."""
    expected = encode(st_directory)
    (st_directory / "modules.json").unlink()
    backend = load(snapshot_of(st_directory))
    assert backend.description.pooling == "cls"
    assert_vectors(backend, expected)
    assert cosines(encode(st_directory), expected).min() < 0.99


# --- weights and classes --------------------------------------------------------------------------------------------


def test_weights_of_layers_that_are_not_declared_are_an_error(st_directory: Path) -> None:
    """config.json declares one layer less than there is."""
    edit(st_directory / "config.json", num_hidden_layers=1)
    with pytest.raises(LoadError, match=r"encoder\.layer\.1\..*config\.json"):
        load(snapshot_of(st_directory))


def test_weights_of_relative_positions_are_an_error(st_directory: Path) -> None:
    """transformers 5 does not have them any more, and would use the model without them."""
    edit(st_directory / "config.json", position_embedding_type="relative_key")
    weights = load_file(st_directory / "model.safetensors")
    for layer in range(2):
        weights[f"encoder.layer.{layer}.attention.self.distance_embedding.weight"] = torch.randn(127, 12)
    save_file(weights, st_directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match="distance_embedding"):
        load(snapshot_of(st_directory))


def test_weights_of_an_adapter_inside_a_model_are_an_error(st_directory: Path) -> None:
    """They would be ignored."""
    weights = load_file(st_directory / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.lora_A.default.weight"] = torch.randn(4, 48)
    save_file(weights, st_directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"lora_A.*adapter"):
        load(snapshot_of(st_directory))


def test_weights_of_heads_do_not_matter(st_directory: Path) -> None:
    """A head does not change token vectors."""
    expected = encode(st_directory)
    weights = {f"bert.{name}": value for name, value in load_file(st_directory / "model.safetensors").items()}
    weights["cls.predictions.bias"] = torch.randn(10)
    weights["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(weights, st_directory / "model.safetensors", {"format": "pt"})
    assert_vectors(load(snapshot_of(st_directory)), expected)


@pytest.mark.parametrize("declared", ["HomemadeModel", "MPNetModel"])
def test_another_class_than_the_declared_one_is_an_error(declared: str, st_directory: Path) -> None:
    """transformers would load BertModel. With `pooling`, the operator says that this is right."""
    expected = encode(st_directory)
    edit(st_directory / "config.json", architectures=[declared])
    with pytest.raises(UnsupportedModelError, match=rf"{declared}.*BertModel.*EMB_PROVIDER_MODEL_MAPPING"):
        load(snapshot_of(st_directory))
    assert_vectors(load(snapshot_of(st_directory), pooling="cls"), expected)


def test_a_model_with_a_stock_name_and_own_code_is_not_loaded_without_trust(tmp_path: Path, own_modules: None) -> None:
    """Such as GTE's Qwen2Model, which has no causal mask. With trust its code runs, and other vectors are the result."""
    directory = save_bare(tmp_path / "model", qwen3, byte_bpe(around=("", "<|endoftext|>"), padding_side="left"))
    expected = encode(directory)
    edit(directory / "config.json", architectures=["Qwen3Model"], auto_map={"AutoModel": "modeling.Qwen3Model"})
    (directory / "modeling.py").write_text(
        "import transformers\n"
        "class Qwen3Model(transformers.Qwen3Model):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        output = super().forward(*args, **kwargs)\n"
        "        output.last_hidden_state = output.last_hidden_state.roll(1, -1)\n"
        "        return output\n"
    )
    with pytest.raises(UnsupportedModelError, match="EMB_PROVIDER_TRUST_REMOTE_CODE"):
        load(snapshot_of(directory))
    backend = load(snapshot_of(directory), trust=True, pooling="lasttoken")
    assert_vectors(backend, np.roll(expected, 1, axis=-1))


def test_code_of_another_repository_is_read_from_its_snapshot(tmp_path: Path, own_modules: None) -> None:
    """It is next to the model for transformers, which looks for nothing on a hub or in its cache."""
    directory = save_bare(tmp_path / "model", bert, wordpiece())
    expected = encode(directory)
    edit(
        directory / "config.json",
        model_type="homemade",
        architectures=["Model"],
        auto_map={"AutoConfig": "other/code--configuration.Config", "AutoModel": "other/code--modeling.Model"},
    )
    code = tmp_path / "code"
    code.mkdir()
    (code / "configuration.py").write_text(
        "from transformers import BertConfig\nclass Config(BertConfig):\n    model_type = 'homemade'\n"
    )
    (code / "modeling.py").write_text(
        "from transformers import BertModel\nfrom .configuration import Config\n"
        "class Model(BertModel):\n    config_class = Config\n"
    )
    snapshot = snapshot_of(directory).with_dependencies({"other/code": snapshot_of(code, repository="other/code")})
    with pytest.raises(UnsupportedModelError, match="the repository other/code"):
        load(snapshot)
    backend = load(snapshot, trust=True)
    assert_vectors(backend, expected)
    assert any("other/code" in note for note in backend.description.notes)


def test_a_router_after_another_module_is_an_error(tmp_path: Path) -> None:
    """Its default route would be used for queries, too."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformer = Transformer(str(save_bare(tmp_path / "bare", bert, wordpiece())))
    router = Router.for_query_document(query_modules=[Dense(48, 8)], document_modules=[Dense(48, 8)])
    model = SentenceTransformer(modules=[transformer, Pooling(48, "mean"), router], device="cpu")
    model.save(str(tmp_path / "routes"), create_model_card=False)
    with pytest.raises(UnsupportedModelError, match="Router"):
        load(snapshot_of(tmp_path / "routes"))


# --- LoRA -----------------------------------------------------------------------------------------------------------


def write_adapter(model: torch.nn.Module, directory: Path, base: str) -> None:
    """Write an adapter with random weights for a model, as PEFT does."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    with warnings.catch_warnings(action="ignore"):  # of transformers, about PEFT
        adapter = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"]))  # type: ignore[arg-type]
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter.save_pretrained(str(directory))
    edit(directory / "adapter_config.json", base_model_name_or_path=base)


@pytest.fixture
def base(tmp_path: Path, family_directory: Callable[[str], Path]) -> Path:
    return Path(shutil.copytree(family_directory("bert-cls"), tmp_path / "base"))


def adapter_snapshot(adapter: Path, base: Path) -> Snapshot:
    return snapshot_of(adapter, repository="me/adapter").with_dependencies(
        {"owner/base": snapshot_of(base, repository="owner/base")}
    )


def with_adapter(base: Path, adapter: Path) -> NDArray[np.float32]:
    """Return the vectors of sentence-transformers with the adapter loaded by transformers, not merged."""
    model = reference(base)
    assert model.transformers_model is not None
    with warnings.catch_warnings(action="ignore"):  # of transformers, about PEFT
        model.transformers_model.load_adapter(str(adapter))
    return np.asarray(model.encode(TEXTS, show_progress_bar=False))


def test_a_lora_adapter_is_merged_into_its_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules and tokenizer are those of the base model. A note says so, and no connection is opened."""
    from transformers import BertModel

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    write_adapter(BertModel.from_pretrained(base), tmp_path / "adapter", "owner/base")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    backend = load(adapter_snapshot(tmp_path / "adapter", base))
    expected = with_adapter(base, tmp_path / "adapter")
    assert_vectors(backend, expected)
    assert cosines(encode(base), expected).min() < 0.99
    assert backend.description.pooling == "cls"
    assert any("LoRA" in note and "owner/base" in note for note in backend.description.notes)


def test_an_adapter_trained_with_a_head_fits_the_model_inside(base: Path, tmp_path: Path) -> None:
    """The names of its weights then begin with that of the model inside."""
    from transformers import BertForMaskedLM

    write_adapter(BertForMaskedLM.from_pretrained(base), tmp_path / "adapter", "owner/base")
    expected = with_adapter(base, tmp_path / "adapter")
    backend = load(adapter_snapshot(tmp_path / "adapter", base))
    assert cosines(embed_texts(backend, TEXTS), encode(base)).min() < 0.99
    assert_vectors(backend, expected)


def test_files_of_an_adapter_replace_those_of_the_base(base: Path, tmp_path: Path) -> None:
    """An adapter that sentence-transformers has saved has its own modules."""
    from transformers import BertModel

    write_adapter(BertModel.from_pretrained(base), tmp_path / "adapter", "owner/base")
    for name in ("modules.json", "1_Pooling"):
        source = base / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "adapter" / name)
    pooling = json.loads((base / "1_Pooling/config.json").read_text())
    edit(tmp_path / "adapter/1_Pooling/config.json", **{**pooling, "pooling_mode": "mean"})
    assert load(adapter_snapshot(tmp_path / "adapter", base)).description.pooling == "mean"


def test_an_adapter_of_another_model_is_an_error(base: Path, tmp_path: Path) -> None:
    """Its weights would be ignored, and the vectors would be those of the base model."""
    from transformers import BertModel

    write_adapter(BertModel.from_pretrained(base), tmp_path / "adapter", "owner/base")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name.replace("layer.1", "layer.7"): value for name, value in load_file(path).items()}, path)
    with pytest.raises(LoadError, match=r"does not fit its base model owner/base.*layer\.7"):
        load(adapter_snapshot(tmp_path / "adapter", base))


def test_an_adapter_without_its_base_is_an_error(base: Path, tmp_path: Path) -> None:
    """The message names the base model and the command that downloads both."""
    from transformers import BertModel

    write_adapter(BertModel.from_pretrained(base), tmp_path / "adapter", "owner/base")
    with pytest.raises(UnsupportedModelError, match=r"owner/base.*emb-provider pull"):
        load(snapshot_of(tmp_path / "adapter"))


def test_a_complete_model_with_an_adapter_is_an_error(base: Path, tmp_path: Path) -> None:
    """Whether the adapter is merged into the weights already is not known. Its configuration alone does not matter."""
    from transformers import BertModel

    expected = encode(base)
    write_adapter(BertModel.from_pretrained(base), tmp_path / "adapter", "owner/base")
    shutil.copy(tmp_path / "adapter/adapter_config.json", base)
    assert_vectors(load(snapshot_of(base)), expected)
    shutil.copy(tmp_path / "adapter/adapter_model.safetensors", base)
    with pytest.raises(UnsupportedModelError, match="both a complete model and an adapter"):
        load(snapshot_of(base))


def test_an_adapter_of_a_classifier_is_an_error(base: Path, tmp_path: Path) -> None:
    """It changes another task than embedding."""
    from transformers import BertModel

    (base / "modules.json").unlink()
    shutil.rmtree(base / "1_Pooling")
    write_adapter(BertModel.from_pretrained(base), tmp_path / "adapter", "owner/base")
    edit(tmp_path / "adapter/adapter_config.json", task_type="SEQ_CLS")
    with pytest.raises(UnsupportedModelError, match="a model for classification"):
        load(adapter_snapshot(tmp_path / "adapter", base))


# --- models that also read images -----------------------------------------------------------------------------------


def test_the_text_part_of_clip_needs_no_packages_for_images(tmp_path: Path) -> None:
    """Only the tokenizer is loaded."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = byte_bpe(around=("<|endoftext|>", "<|endoftext|>"))
    width = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    text = {**width, "vocab_size": len(tokenizer), "max_position_embeddings": 48, "eos_token_id": 0, "bos_token_id": 0}
    config = CLIPConfig(
        text_config={**text, "initializer_range": 0.5},
        vision_config={**width, "image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(3)
    model = CLIPModel(config).eval()
    directory = tmp_path / "clip"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    edit(directory / "preprocessor_config.json", image_processor_type="CLIPImageProcessor")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    (directory / "modules.json").write_text(json.dumps(modules))
    method = {"method": "get_text_features", "method_output_name": "pooler_output"}
    images = {"method": "get_image_features", "method_output_name": "pooler_output"}
    edit(
        directory / "sentence_bert_config.json",
        modality_config={"text": method, "image": images},
        module_output_name="sentence_embedding",
    )
    texts = ["a cat", "Hello World", "two dogs in the snow"]
    rows = []
    for each in texts:
        with torch.inference_mode():
            inputs = tokenizer(each, return_tensors="pt")
            rows.append(model.get_text_features(**inputs).pooler_output[0].numpy())
    vectors = embed_texts(load_torch(directory), texts)
    assert cosines(vectors, np.stack(rows)).min() >= 0.99999
