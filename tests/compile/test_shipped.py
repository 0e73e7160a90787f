"""Where a pipeline cannot be exported, the export of its transformer that the snapshot ships is used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import pytest
import torch

from emb_model_provider.backends.openvino_backend import OpenVinoBackend
from emb_model_provider.backends.openvino_runtime import openvino
from emb_model_provider.compile import graph as graphs
from emb_model_provider.compile.artifact import GRAPH, read_artifact
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


def ship(directory: Path, output: str = "last_hidden_state") -> None:
    """Add `openvino/openvino_model.xml`, as optimum names its parts."""
    model = Transformer(reference(directory).transformers_model)
    ones = torch.ones((3, 11), dtype=torch.int64)
    example = (ones, ones, torch.zeros_like(ones))
    with torch.no_grad(), graphs.quietly():
        trace = torch.jit.trace(model, example, strict=False, check_trace=False)
        graph = openvino().convert_model(trace, example_input=example)
    for port, name in zip(graph.inputs, ("input_ids", "attention_mask", "token_type_ids"), strict=True):
        port.get_node().set_partial_shape(ov.PartialShape([-1, -1]))
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    graph.outputs[0].get_tensor().set_names({output})
    (directory / "openvino").mkdir()
    ov.save_model(graph, directory / "openvino/openvino_model.xml", compress_to_fp16=False)


def nothing_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("cannot be exported")

    monkeypatch.setattr(graphs, "WAYS", {"torch.export": fails})


@pytest.mark.parametrize("family", ["bert-cls", "bert-dense", "bert-prompts-excluded"])
def test_a_shipped_transformer_gets_the_rest_of_its_pipeline(
    family: str, compiled: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pooling, Dense and left-out prompts stand behind it; the manifest names the file."""
    directory = Path(shutil.copytree(compiled(family, precision="fp32").directory, tmp_path / "model"))
    ship(directory)
    nothing_exports(monkeypatch)
    result, _ = compile_here(directory, tmp_path / "artifact", precision="fp32")
    assert result.outcome == "done", result
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact is not None
    assert artifact.made_by == "openvino/openvino_model.xml"
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
