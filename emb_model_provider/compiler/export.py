"""A pipeline as a module of tensors, and that module as an OpenVINO graph. Runs in the compile process only."""

from __future__ import annotations

import contextlib
import logging
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding

from emb_model_provider.backends.openvino_cpu.runtime import ATTENTION_MASK, INPUT_IDS, POOLING_MASK, openvino
from emb_model_provider.errors import UnsupportedModelError
from emb_model_provider.hubs.selection import EXPORTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sentence_transformers import SentenceTransformer

    from emb_model_provider.backends.openvino_cpu.runtime import Graph
    from emb_model_provider.snapshots.snapshot import Snapshot


logger = logging.getLogger(__name__)

_EXAMPLE_SHAPE = (3, 11)
"""Of the example inputs: torch.export takes a size of 0 or 1 for a constant, and equal sizes for one size."""


_ATTEND_TO_ALL = frozenset(
    (
        "albert",
        "bert",
        "camembert",
        "distilbert",
        "electra",
        "mpnet",
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
    )
)
"""Model types whose tokens attend to every real token of their text, so that no row of the mask is empty. Any
other type gets `_unmask_fully_masked_rows`, which costs some per cent on texts of 256 tokens."""


class PipelineModule(torch.nn.Module):
    """Token ids and masks in, vectors out; all int64 of shape (batch, length)."""

    def __init__(self, pipeline: SentenceTransformer) -> None:
        super().__init__()
        self.stages = torch.nn.ModuleList(pipeline)
        self.excludes_prompt = any(
            isinstance(stage, Pooling) and not stage.include_prompt for stage in self.stages
        )
        self.truncate_dim = pipeline.truncate_dim

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pooling_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.run(
            {INPUT_IDS: input_ids, ATTENTION_MASK: attention_mask}, list(self.stages), pooling_mask
        )

    def run(
        self, features: dict[str, Any], stages: Sequence[torch.nn.Module], pooling_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Run some of the pipeline's stages over features, and cut what comes out to `truncate_dim`."""
        for stage in stages:
            if isinstance(stage, Pooling) and not stage.include_prompt and pooling_mask is not None:
                # The same as sentence-transformers' prompt_length, but each row has its own.
                features = stage({**features, ATTENTION_MASK: pooling_mask})
            else:
                features = stage(features)
        vectors: torch.Tensor = features["sentence_embedding"]
        return vectors[:, : self.truncate_dim] if self.truncate_dim is not None else vectors

    def example(self) -> dict[str, torch.Tensor]:
        """Return inputs of different lengths, padded on either side."""
        ids = torch.ones(_EXAMPLE_SHAPE, dtype=torch.int64)
        mask = torch.ones(_EXAMPLE_SHAPE, dtype=torch.int64)
        mask[1, 7:] = 0
        mask[2, :4] = 0
        inputs = {INPUT_IDS: ids, ATTENTION_MASK: mask}
        if self.excludes_prompt:
            inputs[POOLING_MASK] = mask.clone()
        return inputs


def check_exportable(pipeline: SentenceTransformer) -> None:
    """Raises: UnsupportedModelError for a pipeline that only the torch backend can run."""
    if isinstance(pipeline[0], StaticEmbedding):
        raise UnsupportedModelError(
            "static embeddings are looked up and averaged: there is nothing to compile"
        )
    for stage in pipeline:
        if isinstance(stage, Pooling) and not stage.include_prompt and "weightedmean" in stage.pooling_mode:
            raise UnsupportedModelError(
                "weighted mean pooling that leaves the prompt out counts positions from the prompt's start"
            )


def export(pipeline: SentenceTransformer, tell: Callable[[str], None]) -> Graph:
    """Convert what torch.export makes of a pipeline. Raises: whatever torch or OpenVINO raises."""
    module = PipelineModule(pipeline).eval()
    inputs = module.example()
    dynamic = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in inputs}
    tell("export")
    with torch.no_grad():
        program = torch.export.export(module, (), kwargs=inputs, dynamic_shapes=dynamic)
        tell("convert")
        return finalize(openvino().convert_model(program), list(inputs), pipeline)


def traced(pipeline: SentenceTransformer, tell: Callable[[str], None]) -> Graph:
    """Convert what tracing makes of a pipeline. Raises: whatever torch or OpenVINO raises."""
    module = PipelineModule(pipeline).eval()
    inputs = module.example()
    tell("trace")
    with torch.no_grad():
        example = tuple(inputs.values())
        trace: Any = torch.jit.trace(module, example, strict=False, check_trace=False)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        tell("convert")
        return finalize(openvino().convert_model(trace, example_input=example), list(inputs), pipeline)


def traced_without_fused_attention(pipeline: SentenceTransformer, tell: Callable[[str], None]) -> Graph:
    """Trace a pipeline whose attention is spelled out. Raises: whatever torch or OpenVINO raises."""
    if pipeline.transformers_model is not None:
        pipeline.transformers_model.set_attn_implementation("eager")
    return traced(pipeline, tell)


EXPORTERS: dict[str, Callable[[SentenceTransformer, Callable[[str], None]], Graph]] = {
    "torch.export": export,
    "tracing": traced,
    "tracing, attention not fused": traced_without_fused_attention,
}
"""How a graph can be had, in the order in which it is tried; each is told how to report a phase."""


def dimension_of(pipeline: SentenceTransformer) -> int:
    """Return the size of a pipeline's vectors, by running it."""
    if isinstance(pipeline[0], StaticEmbedding):
        return int(pipeline.get_embedding_dimension() or 0)
    module = PipelineModule(pipeline).eval()
    with torch.no_grad():
        return int(module(**module.example()).shape[1])


@contextlib.contextmanager
def quietly() -> Any:
    """Keep the libraries' warnings about tracing and deprecations out of the service's log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def without_cache(pipeline: SentenceTransformer) -> None:
    """Switch a decoder's key-value cache off: a text is read once, and the cache would be part of the graph."""
    model = pipeline.transformers_model
    if model is not None and getattr(model.config, "use_cache", False):
        model.config.use_cache = False


def finalize(graph: Graph, names: list[str], pipeline: SentenceTransformer) -> Graph:
    """Give inputs and output their names, say that batch and length are free, and keep attention finite."""
    if len(graph.inputs) != len(names):
        raise UnsupportedModelError(f"its graph reads {len(graph.inputs)} inputs, not {', '.join(names)}")
    ports = [input_named(graph, name, place) for place, name in enumerate(names)]
    for port, name in zip(ports, names, strict=True):
        port.get_node().set_partial_shape(openvino().PartialShape([-1, -1]))
        port.get_tensor().set_names({name})
    if not _attends_to_all(pipeline):
        _unmask_fully_masked_rows(graph)
    graph.validate_nodes_and_infer_types()
    graph.outputs[0].get_tensor().set_names({"sentence_embedding"})
    return graph


def input_named(graph: Graph, name: str, place: int) -> Any:
    """Return a graph's input of a name; where tracing lost the names, the one at its place."""
    known = {known: port for port in graph.inputs for known in port.get_names()}
    return known.get(name, graph.inputs[place])


def _attends_to_all(pipeline: SentenceTransformer) -> bool:
    model = pipeline.transformers_model
    return (
        model is not None
        and model.config.model_type in _ATTEND_TO_ALL
        and not getattr(model.config, "is_decoder", False)
    )


def _unmask_fully_masked_rows(graph: Graph) -> None:
    """Let a token that its attention mask shows nothing see everything.

    Such tokens are padding: before the first token of a left-padded text, or farther from the last one than a
    sliding window reaches. Nobody reads their vectors, but PyTorch gives them zeros and OpenVINO gives them NaN,
    which spreads from there: through a mean that multiplies them with 0, or to all tokens in the next layer.
    """
    ops = openvino().opset13
    seeing: dict[tuple[str, int], Any] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or node.get_input_size() < 4:
            continue
        mask = node.input_value(3)
        if mask.get_element_type() != openvino().Type.boolean:
            continue
        place = mask.get_node().get_friendly_name(), mask.get_index()
        if place not in seeing:
            sees = ops.reduce_logical_or(mask, ops.constant([-1], dtype=np.int64), keep_dims=True)
            seeing[place] = ops.logical_or(mask, ops.logical_not(sees)).output(0)
        node.input(3).replace_source_output(seeing[place])


_TOKEN_VECTORS = ("token_embeddings", "last_hidden_state")


def prebuilt_exports(
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
    return finalize(graph, [INPUT_IDS, *masks], pipeline)


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
