"""Using the export that a snapshot ships, where its pipeline cannot be exported here. In the compile process only.

Such exports (optimum makes them) hold the transformer alone: token vectors come out. What follows it, pooling and
the rest, is exported here and put behind, so that the artifact is whole and is verified like any other.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from emb_model_provider.backends.openvino_runtime import ATTENTION_MASK, INPUT_IDS, openvino
from emb_model_provider.compile.graph import PipelineModule, finished, input_named
from emb_model_provider.errors import UnsupportedModelError
from emb_model_provider.hubs.selection import EXPORTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sentence_transformers import SentenceTransformer

    from emb_model_provider.backends.openvino_runtime import Graph
    from emb_model_provider.hubs.snapshot import Snapshot

_TOKEN_VECTORS = ("token_embeddings", "last_hidden_state")


def ways_shipped(
    snapshot: Snapshot,
) -> dict[str, Callable[[SentenceTransformer, Callable[[str], None]], Graph]]:
    """Return how to use each export among a snapshot's files, by its name."""
    present = {file.path for file in snapshot.files}
    return {name: partial(_joined, snapshot.path / name) for name in EXPORTS if name in present}


class _Tail(torch.nn.Module):
    """What follows a pipeline's transformer: token vectors and masks in, one vector a text out."""

    def __init__(self, whole: PipelineModule) -> None:
        super().__init__()
        self.whole = whole

    def forward(
        self,
        token_embeddings: torch.Tensor,
        attention_mask: torch.Tensor,
        pooling_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        features = {"token_embeddings": token_embeddings, "attention_mask": attention_mask}
        return self.whole.run(features, list(self.whole.stages)[1:], pooling_mask)


def _joined(path: Path, pipeline: SentenceTransformer, tell: Callable[[str], None]) -> Graph:
    """Put a pipeline's later stages behind an export of its transformer.

    Raises: UnsupportedModelError where the export has other inputs or outputs; whatever OpenVINO raises.
    """
    tell(f"read {path.name}")
    ov = openvino()
    body = ov.Core().read_model(path)
    vectors = _token_vectors(body)
    tell("convert")
    whole = PipelineModule(pipeline).eval()
    masks = {name: value for name, value in whole.example().items() if name != INPUT_IDS}
    hidden = torch.randn(*masks[ATTENTION_MASK].shape, _width(pipeline))
    example = (hidden, *masks.values())
    with torch.no_grad():
        trace: Any = torch.jit.trace(_Tail(whole).eval(), example, strict=False, check_trace=False)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        tail = ov.convert_model(trace, example_input=example)
    ids, mask = _inputs(body)
    ports = [input_named(tail, name, place) for place, name in enumerate(["token_embeddings", *masks])]
    ports[0].replace(vectors)
    ports[1].replace(mask.output(0))
    inputs = [ids, mask, *(port.get_node() for port in ports[2:])]
    graph = ov.Model([tail.outputs[0].get_node().input_value(0)], inputs, "joined")
    return finished(graph, [INPUT_IDS, *masks], pipeline)


def _token_vectors(body: Graph) -> Any:
    for name in _TOKEN_VECTORS:
        for port in body.outputs:
            if name in port.get_names() and port.get_partial_shape().rank.get_length() == 3:
                return port.get_node().input_value(0)
    raise UnsupportedModelError(f"it gives none of {', '.join(_TOKEN_VECTORS)}")


def _inputs(body: Graph) -> tuple[Any, Any]:
    """Return the nodes of token ids and attention mask, after token types were set to 0."""
    ops, found = openvino().opset13, {}
    for port in body.inputs:
        found[port.get_any_name()] = port
    if "token_type_ids" in found:
        port = found.pop("token_type_ids")
        zero = ops.constant(0, dtype=np.int64)
        port.replace(ops.broadcast(zero, ops.shape_of(found[INPUT_IDS])).output(0))
    if set(found) != {INPUT_IDS, ATTENTION_MASK}:
        raise UnsupportedModelError(f"it reads {', '.join(sorted(found))}")
    return found[INPUT_IDS].get_node(), found[ATTENTION_MASK].get_node()


def _width(pipeline: SentenceTransformer) -> int:
    first: Any = pipeline[0]
    return int(first.get_embedding_dimension())
