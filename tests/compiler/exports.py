"""Exports of small models to ONNX and OpenVINO, as optimum writes them."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import openvino as ov
import torch

from emb_model_provider.backends.openvino_cpu.runtime import openvino
from tests.backends.helpers import reference

if TYPE_CHECKING:
    from pathlib import Path

OPENVINO, ONNX = "openvino/openvino_model.xml", "onnx/model.onnx"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Transformer(torch.nn.Module):
    """The part of a BERT model that optimum exports: three inputs, and token vectors, or pooled ones (cls)."""

    def __init__(self, model: Any, *, pooled: bool) -> None:
        super().__init__()
        self.model = model
        self.pooled = pooled

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        tokens = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        return tokens[:, 0] if self.pooled else tokens


def add_export(
    directory: Path, name: str = OPENVINO, output: str = "last_hidden_state", *, pooled: bool = False
) -> None:
    """Add an export to a directory, with the names that optimum uses.

    Args:
        directory: A directory with a BERT model.
        name: The path of the export; its end decides on the format.
        output: The name of its output.
        pooled: Whether it returns pooled vectors.
    """
    model = Transformer(reference(directory).transformers_model, pooled=pooled).eval()
    ones = torch.ones((3, 11), dtype=torch.int64)
    # Without padding, transformers would omit the mask, and torch.export omits unused inputs.
    padded = ones.clone()
    padded[1, 7:] = 0
    example = (ones, padded, torch.zeros_like(ones))
    (directory / name).parent.mkdir(exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        if name.endswith(".onnx"):
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


class Decoder(torch.nn.Module):
    """The part of a decoder that optimum exports: it gets the positions of the tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any) -> Any:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state


def export_decoder(directory: Path) -> Path:
    """Replace the weights of a decoder by an ONNX file with its weights in another file."""
    ids = torch.ones((3, 11), dtype=torch.int64)
    mask = ids.clone()
    mask[1, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            Decoder(reference(directory).transformers_model).eval(), tuple(inputs.values()), directory / "model.onnx",
            input_names=list(inputs), output_names=["last_hidden_state"], verbose=False,
            dynamic_shapes=dict.fromkeys(inputs, dynamic), external_data=True, dynamo=True,
        )  # fmt: skip
    _remove_weights(directory)
    return directory


def export_only(directory: Path, name: str = ONNX, **options: Any) -> Path:
    """Add an export to a directory and remove its weights; see `add_export` for the options."""
    add_export(directory, name, **options)
    _remove_weights(directory)
    return directory


def remove_modules(directory: Path) -> None:
    """Remove everything that says how token vectors become one."""
    for module in json.loads((directory / "modules.json").read_text()):
        for path in (directory / module["path"]).glob("*") if module["path"] else ():
            path.unlink()
    (directory / "modules.json").unlink()


def _remove_weights(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        path.unlink()
