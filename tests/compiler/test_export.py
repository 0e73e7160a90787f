"""Prebuilt exports in a snapshot are used if the pipeline cannot be exported."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino as ov
import pytest
import torch

from emb_model_provider.artifacts.manifest import GRAPH, read_artifact
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.openvino_cpu.runtime import openvino
from emb_model_provider.compiler.export import check_exportable, prebuilt_exporters
from emb_model_provider.errors import UnsupportedModelError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.settings import HubSettings
from tests.artifacts.helpers import CompiledModels, compile_here
from tests.backends.helpers import TEXTS, cosines, embed_texts, reference
from tests.backends.small_tokenizers import wordpiece
from tests.marks import mark_slow_except

if TYPE_CHECKING:
    from emb_model_provider.compiler.export import Exporter

OPENVINO, ONNX = "openvino/openvino_model.xml", "onnx/model.onnx"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Transformer(torch.nn.Module):
    """The part of a BERT model that optimum exports: three inputs, and token vectors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state


def failing_export(*_: object) -> Any:
    raise RuntimeError("cannot be exported")


NO_EXPORTER: dict[str, Exporter] = {"torch.export": failing_export}


def add_export(directory: Path, name: str = OPENVINO, output: str = "last_hidden_state") -> None:
    """Add an export to a directory, with the names that optimum uses."""
    model = Transformer(reference(directory).transformers_model).eval()
    ones = torch.ones((3, 11), dtype=torch.int64)
    # Without padding, transformers would omit the mask, and torch.export omits unused inputs.
    padded = ones.clone()
    padded[1, 7:] = 0
    example = (ones, padded, torch.zeros_like(ones))
    (directory / name).parent.mkdir()
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        if name == ONNX:
            dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
            torch.onnx.export(
                model, example, directory / name, input_names=INPUTS, output_names=[output], verbose=False,
                dynamic_shapes=dict.fromkeys(INPUTS, dynamic), external_data=False, dynamo=True,
            )  # fmt: skip
            return
        trace = torch.jit.trace(model, example, strict=False, check_trace=False)
        graph = openvino().convert_model(trace, example_input=example)
    for port, input_name in zip(graph.inputs, INPUTS, strict=True):
        port.get_node().set_partial_shape(ov.PartialShape([-1, -1]))
        port.get_tensor().set_names({input_name})
    graph.validate_nodes_and_infer_types()
    graph.outputs[0].get_tensor().set_names({output})
    ov.save_model(graph, directory / name, compress_to_fp16=False)


def copy_of(family: str, compiled: CompiledModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled.directory(family), tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert-cls", OPENVINO),
        ("bert-prompts-excluded", OPENVINO),
        ("bert-dense", ONNX),
        ("bert-prompts-excluded", ONNX),
    ],
)
def test_a_prebuilt_export_is_extended_by_the_later_stages(
    family: str, name: str, compiled: CompiledModels, tmp_path: Path
) -> None:
    """Pooling, Dense and excluded prompts; the manifest names the file."""
    directory = copy_of(family, compiled, tmp_path)
    add_export(directory, name)
    result, _ = compile_here(directory, tmp_path / "artifact", exporters=NO_EXPORTER, precision="fp32")
    assert result.outcome == "done", result
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact is not None
    assert artifact.made_by == name
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    vectors = embed_texts(OpenVinoBackend(artifact.directory / GRAPH, artifact.description, cpus=2), TEXTS)
    assert cosines(vectors, expected).min() >= 0.9999


@pytest.mark.slow
def test_a_prebuilt_export_without_token_vectors_is_not_used(compiled: CompiledModels, tmp_path: Path) -> None:
    """The reason names the outputs that are required."""
    directory = copy_of("bert-cls", compiled, tmp_path)
    add_export(directory, output="logits")
    result, _ = compile_here(directory, tmp_path / "artifact", exporters=NO_EXPORTER, precision="fp32")
    assert result.outcome == "unsupported"
    assert "openvino/openvino_model.xml: it has none of the outputs token_embeddings" in result.reason


@pytest.mark.parametrize("name", mark_slow_except([OPENVINO, ONNX], ONNX))
def test_a_prebuilt_export_is_part_of_the_snapshot(name: str, compiled: CompiledModels, tmp_path: Path) -> None:
    """It is hashed like the weights, so it changes the digest, and the compiler finds it."""
    directory = copy_of("bert-cls", compiled, tmp_path)
    spec, settings = ModelSpec(alias="a", name="a", path=directory), HubSettings(cache_dir=tmp_path / "cache")
    before = fetch_snapshot(spec, settings)
    assert prebuilt_exporters(before) == {}
    add_export(directory, name)
    after = fetch_snapshot(spec, settings)
    assert list(prebuilt_exporters(after)) == [name]
    assert after.digest != before.digest
    assert {file.path for file in after.files} >= {name, name.replace(".xml", ".bin")}


@pytest.mark.slow
def test_a_prebuilt_export_without_weights_is_an_error(compiled: CompiledModels, tmp_path: Path) -> None:
    """sentence-transformers cannot load it, so there is nothing to compare the export with."""
    directory = copy_of("bert-cls", compiled, tmp_path)
    add_export(directory, ONNX)
    (directory / "model.safetensors").unlink()
    result, _ = compile_here(directory, tmp_path / "artifact", precision="fp32")
    assert result.outcome == "broken"


def test_static_embeddings_are_not_exportable() -> None:
    """The torch backend serves them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = StaticEmbedding(wordpiece().backend_tokenizer, embedding_dim=24)
    pipeline = SentenceTransformer(modules=[static], device="cpu", local_files_only=True)
    with pytest.raises(UnsupportedModelError, match="nothing to compile"):
        check_exportable(pipeline)
