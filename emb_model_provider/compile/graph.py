"""A pipeline as a module of tensors, and that module as an OpenVINO graph. Runs in the compile process only."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding

from emb_model_provider.backends.openvino_runtime import ATTENTION_MASK, INPUT_IDS, POOLING_MASK, openvino
from emb_model_provider.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sentence_transformers import SentenceTransformer

    from emb_model_provider.backends.openvino_runtime import Graph

logger = logging.getLogger(__name__)

_EXAMPLE_SHAPE = (3, 11)
"""Of the example inputs: torch.export takes a size of 0 or 1 for a constant, and equal sizes for one size."""


_SEE_EVERYTHING = frozenset(
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
other type gets `_let_blind_rows_see`, which costs some per cent on texts of 256 tokens."""


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


def refuse_what_has_no_graph(pipeline: SentenceTransformer) -> None:
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


def exported(pipeline: SentenceTransformer, tell: Callable[[str], None]) -> Graph:
    """Convert what torch.export makes of a pipeline. Raises: whatever torch or OpenVINO raises."""
    module = PipelineModule(pipeline).eval()
    inputs = module.example()
    dynamic = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in inputs}
    tell("export")
    with torch.no_grad():
        program = torch.export.export(module, (), kwargs=inputs, dynamic_shapes=dynamic)
        tell("convert")
        return finished(openvino().convert_model(program), list(inputs), pipeline)


def traced(pipeline: SentenceTransformer, tell: Callable[[str], None]) -> Graph:
    """Convert what tracing makes of a pipeline. Raises: whatever torch or OpenVINO raises."""
    module = PipelineModule(pipeline).eval()
    inputs = module.example()
    tell("trace")
    with torch.no_grad():
        example = tuple(inputs.values())
        trace: Any = torch.jit.trace(module, example, strict=False, check_trace=False)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        tell("convert")
        return finished(openvino().convert_model(trace, example_input=example), list(inputs), pipeline)


def traced_without_fused_attention(pipeline: SentenceTransformer, tell: Callable[[str], None]) -> Graph:
    """Trace a pipeline whose attention is spelled out. Raises: whatever torch or OpenVINO raises."""
    if pipeline.transformers_model is not None:
        pipeline.transformers_model.set_attn_implementation("eager")
    return traced(pipeline, tell)


WAYS: dict[str, Callable[[SentenceTransformer, Callable[[str], None]], Graph]] = {
    "torch.export": exported,
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


def finished(graph: Graph, names: list[str], pipeline: SentenceTransformer) -> Graph:
    """Give inputs and output their names, say that batch and length are free, and keep attention finite."""
    if len(graph.inputs) != len(names):
        raise UnsupportedModelError(f"its graph reads {len(graph.inputs)} inputs, not {', '.join(names)}")
    ports = [input_named(graph, name, place) for place, name in enumerate(names)]
    for port, name in zip(ports, names, strict=True):
        port.get_node().set_partial_shape(openvino().PartialShape([-1, -1]))
        port.get_tensor().set_names({name})
    if not _sees_everything(pipeline):
        _let_blind_rows_see(graph)
    graph.validate_nodes_and_infer_types()
    graph.outputs[0].get_tensor().set_names({"sentence_embedding"})
    return graph


def input_named(graph: Graph, name: str, place: int) -> Any:
    """Return a graph's input of a name; where tracing lost the names, the one at its place."""
    known = {known: port for port in graph.inputs for known in port.get_names()}
    return known.get(name, graph.inputs[place])


def _sees_everything(pipeline: SentenceTransformer) -> bool:
    model = pipeline.transformers_model
    return (
        model is not None
        and model.config.model_type in _SEE_EVERYTHING
        and not getattr(model.config, "is_decoder", False)
    )


def _let_blind_rows_see(graph: Graph) -> None:
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
