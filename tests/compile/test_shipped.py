"""Where a pipeline cannot be exported, the export of its transformer that the snapshot ships is used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import pytest
import torch

from emb_model_provider.artifacts.manifest import GRAPH, read_artifact
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.openvino_cpu.runtime import openvino
from emb_model_provider.compiler import export as graphs
from emb_model_provider.compiler.export import prebuilt_exports
from emb_model_provider.errors import IncompleteRepositoryError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.settings import HubSettings
from tests.backends.comparison import TEXTS, cosines, embed_texts, reference
from tests.compile.conftest import compile_here

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.compile.conftest import Compiled


class Transformer(torch.nn.Module):
    """What optimum exports of a BERT: three inputs, and token vectors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state


OPENVINO, ONNX = "openvino/openvino_model.xml", "onnx/model.onnx"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def ship(directory: Path, name: str = OPENVINO, output: str = "last_hidden_state") -> None:
    """Add an export, with its parts named as optimum names them."""
    model = Transformer(reference(directory).transformers_model).eval()
    ones = torch.ones((3, 11), dtype=torch.int64)
    padded = ones.clone()
    padded[1, 7:] = (
        0  # where there is no padding, transformers leaves the mask out, and torch.export what is not there
    )
    example = (ones, padded, torch.zeros_like(ones))
    (directory / name).parent.mkdir()
    with torch.no_grad(), graphs.quietly():
        if name == ONNX:
            free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
            torch.onnx.export(
                model, example, directory / name, input_names=INPUTS, output_names=[output], verbose=False,
                dynamic_shapes=dict.fromkeys(INPUTS, free), external_data=False, dynamo=True,
            )  # fmt: skip
            return
        trace = torch.jit.trace(model, example, strict=False, check_trace=False)
        graph = openvino().convert_model(trace, example_input=example)
    for port, read in zip(graph.inputs, INPUTS, strict=True):
        port.get_node().set_partial_shape(ov.PartialShape([-1, -1]))
        port.get_tensor().set_names({read})
    graph.validate_nodes_and_infer_types()
    graph.outputs[0].get_tensor().set_names({output})
    ov.save_model(graph, directory / name, compress_to_fp16=False)


def nothing_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("cannot be exported")

    monkeypatch.setattr(graphs, "EXPORTERS", {"torch.export": fails})


@pytest.mark.parametrize(
    ("family", "name"),
    [("bert-cls", OPENVINO), ("bert-prompts-excluded", OPENVINO), ("bert-dense", ONNX), ("bert-prompts-excluded", ONNX)],
)  # fmt: skip
def test_a_shipped_transformer_gets_the_rest_of_its_pipeline(
    family: str, name: str, compiled: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pooling, Dense and left-out prompts stand behind it; the manifest names the file."""
    directory = Path(shutil.copytree(compiled(family, precision="fp32").directory, tmp_path / "model"))
    ship(directory, name)
    nothing_exports(monkeypatch)
    result, _ = compile_here(directory, tmp_path / "artifact", precision="fp32")
    assert result.outcome == "done", result
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact is not None
    assert artifact.made_by == name
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    vectors = embed_texts(OpenVinoBackend(artifact.directory / GRAPH, artifact.description, cpus=2), TEXTS)
    assert cosines(vectors, np.asarray(expected)).min() >= 0.9999


def test_an_export_without_token_vectors_is_not_used(
    compiled: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason names what was looked for."""
    directory = Path(shutil.copytree(compiled("bert-cls", precision="fp32").directory, tmp_path / "model"))
    ship(directory, output="logits")
    nothing_exports(monkeypatch)
    result, _ = compile_here(directory, tmp_path / "artifact", precision="fp32")
    assert result.outcome == "unsupported"
    assert "openvino/openvino_model.xml: UnsupportedModelError: it gives none of" in result.reason


@pytest.mark.parametrize("name", [OPENVINO, ONNX])
def test_an_export_in_a_directory_is_part_of_its_snapshot(
    name: str, compiled: Callable[..., Compiled], tmp_path: Path
) -> None:
    """So it is hashed like the weights, the artifact is that of these very files, and the compile step sees it."""
    directory = Path(shutil.copytree(compiled("bert-cls", precision="fp32").directory, tmp_path / "model"))
    spec, settings = ModelSpec(alias="a", name="a", path=directory), HubSettings(cache_dir=tmp_path / "cache")
    before = fetch_snapshot(spec, settings)
    assert prebuilt_exports(before) == {}
    ship(directory, name)
    after = fetch_snapshot(spec, settings)
    assert list(prebuilt_exports(after)) == [name]
    assert after.digest != before.digest
    assert {file.path for file in after.files} >= {name, name.replace(".xml", ".bin")}


def test_an_export_alone_is_refused(compiled: Callable[..., Compiled], tmp_path: Path) -> None:
    """sentence-transformers cannot load it, so there is nothing that its vectors could be compared with."""
    directory = Path(shutil.copytree(compiled("bert-cls", precision="fp32").directory, tmp_path / "model"))
    ship(directory, ONNX)
    (directory / "model.safetensors").unlink()
    result, _ = compile_here(directory, tmp_path / "artifact", precision="fp32")
    assert result.outcome == "broken"
    with pytest.raises(IncompleteRepositoryError, match=r"no weights.*only an export \(onnx/model\.onnx\)"):
        fetch_snapshot(
            ModelSpec(alias="a", name="a", path=directory), HubSettings(cache_dir=tmp_path / "cache")
        )
