"""Exports a pipeline as an OpenVINO graph: from token ids and masks to vectors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding

from emb_model_provider.backends.base import (
    ATTENTION_MASK,
    INPUT_IDS,
    POOLING_MASK,
    SENTENCE_EMBEDDING,
    TOKEN_TYPES,
    TOKEN_VECTORS,
)
from emb_model_provider.backends.openvino_cpu.runtime import Graph, openvino
from emb_model_provider.backends.pytorch.heads import Served, constant_features
from emb_model_provider.errors import UnsupportedModelError
from emb_model_provider.hubs.selection import EXPORTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from sentence_transformers.base.model import BaseModel

    from emb_model_provider.snapshots.snapshot import Snapshot

Exporter = Callable[[Served, Callable[[str], None]], Graph]
"""Makes the graph of a served pipeline, and calls its second argument with the name of each step when it begins."""

_EXAMPLE_SHAPE = (3, 11)
"""Shape of the example inputs, because torch.export treats sizes of 0 and 1 as constants, and equal sizes as one."""
_FULL_ATTENTION_TYPES = frozenset(
    {"albert", "bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"}
)
"""Model types whose tokens attend to all real tokens of their text, so that no row of the attention mask is fully
masked. Other types get `_unmask_fully_masked_rows`, which makes texts of 256 tokens a few per cent slower."""
_OUTPUTS = {
    3: (TOKEN_VECTORS, "last_hidden_state"),
    2: (SENTENCE_EMBEDDING, "sentence_embeddings", "text_embeds", "embeddings", "embedding"),
}
"""Names that prebuilt exports give to token vectors and to pooled vectors, by the number of dimensions."""
_POSITIONS = "position_ids"


class PipelineModule(torch.nn.Module):
    """A served pipeline as a module of tensors: ids and masks, int64 of shape (batch, length), to the arrays by name."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self.stages = torch.nn.ModuleList(served.pipeline)
        self.arrays = served.arrays
        self.constants = constant_features(served.pipeline)
        self.has_token_types = served.has_token_types
        self.excludes_prompt = any(isinstance(stage, Pooling) and not stage.include_prompt for stage in self.stages)
        self.truncate_dim = getattr(served.pipeline, "truncate_dim", None)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the arrays for inputs in the order of `example`."""
        features: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        return self.run(features, list(self.stages), features.pop(POOLING_MASK, None))

    def run(
        self, features: dict[str, Any], stages: Sequence[torch.nn.Module], pooling_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Run some stages of the pipeline over features, and truncate vectors to `truncate_dim`."""
        features = {**features, **self.constants}
        for stage in stages:
            if isinstance(stage, Pooling) and not stage.include_prompt and pooling_mask is not None:
                # Like the prompt_length of sentence-transformers, but with one length per row.
                features = stage({**features, ATTENTION_MASK: pooling_mask})
            else:
                features = stage(features)
        # Activations of logits, and the comparison of scores, need more digits than bf16 has.
        return tuple(
            features[name][:, : self.truncate_dim] if name == SENTENCE_EMBEDDING else features[name].float()
            for name in self.arrays
        )

    @property
    def names(self) -> list[str]:
        """The names of the inputs."""
        optional = {POOLING_MASK: self.excludes_prompt, TOKEN_TYPES: self.has_token_types}
        return [INPUT_IDS, ATTENTION_MASK, *(name for name, present in optional.items() if present)]

    def example(self) -> dict[str, torch.Tensor]:
        """Return inputs of different lengths, padded on the left and on the right."""
        ids = torch.ones(_EXAMPLE_SHAPE, dtype=torch.int64)
        mask = torch.ones(_EXAMPLE_SHAPE, dtype=torch.int64)
        mask[1, 7:] = 0
        mask[2, :4] = 0
        return {name: ids.clone() if name == INPUT_IDS else mask.clone() for name in self.names}


def check_exportable(served: Served) -> None:
    """Raise UnsupportedModelError if only the torch backend can run a pipeline."""
    if isinstance(served.pipeline[0], StaticEmbedding):
        raise UnsupportedModelError("static embeddings are only looked up and averaged, so there is nothing to compile")
    for stage in served.pipeline:
        if isinstance(stage, Pooling) and not stage.include_prompt and "weightedmean" in stage.pooling_mode:
            raise UnsupportedModelError(
                "weighted mean pooling that excludes the prompt counts positions from the start of the prompt"
            )


def export(served: Served, on_step: Callable[[str], None]) -> Graph:
    module = PipelineModule(served).eval()
    inputs = module.example()
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    on_step("export")
    with torch.no_grad():
        program = torch.export.export(
            module, tuple(inputs.values()), dynamic_shapes={"inputs": tuple(dict(dynamic) for _ in inputs)}
        )
        on_step("convert")
        return _finalize(openvino().convert_model(program), list(inputs), served)


def trace(served: Served, on_step: Callable[[str], None]) -> Graph:
    module = PipelineModule(served)
    inputs = module.example()
    on_step("trace")
    return _finalize(_trace(module, tuple(inputs.values()), on_step), list(inputs), served)


def trace_without_fused_attention(served: Served, on_step: Callable[[str], None]) -> Graph:
    model = served.pipeline.transformers_model
    if model is None:
        return trace(served, on_step)
    # Restored, because the same pipeline may compute the reference afterwards.
    fused = str(model.config._attn_implementation)
    model.set_attn_implementation("eager")
    try:
        return trace(served, on_step)
    finally:
        model.set_attn_implementation(fused)


EXPORTERS: Mapping[str, Exporter] = {
    "torch.export": export,
    "tracing": trace,
    "tracing, attention not fused": trace_without_fused_attention,
}
"""Exporters by name, in the order in which they are tried."""


def prebuilt_exporters(snapshot: Snapshot) -> dict[str, Exporter]:
    """Return an exporter for each prebuilt export among the files of a snapshot, by the path of the file."""
    present = {file.path for file in snapshot.files}
    return {name: prebuilt_exporter(snapshot, name) for name in EXPORTS if name in present}


def prebuilt_exporter(snapshot: Snapshot, name: str) -> Exporter:
    """Return the exporter that completes a prebuilt export by the later stages of a pipeline."""
    return partial(_extend_prebuilt, snapshot.path / name)


def _trace(module: torch.nn.Module, example: tuple[torch.Tensor, ...], on_step: Callable[[str], None]) -> Graph:
    with torch.no_grad():
        traced: Any = torch.jit.trace(module.eval(), example, strict=False, check_trace=False)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        on_step("convert")
        return openvino().convert_model(traced, example_input=example)


def _finalize(graph: Graph, names: list[str], served: Served) -> Graph:
    """Name inputs and outputs, make batch and length dynamic, and keep attention finite."""
    if len(graph.inputs) != len(names):
        raise UnsupportedModelError(f"its graph has {len(graph.inputs)} inputs, not {', '.join(names)}")
    ports = _find_inputs(graph, names)
    for port, name in zip(ports, names, strict=True):
        port.get_node().set_partial_shape(openvino().PartialShape([-1, -1]))
        port.get_tensor().set_names({name})
    if not _has_full_attention(served.pipeline):
        _unmask_fully_masked_rows(graph)
    graph.validate_nodes_and_infer_types()
    if len(graph.outputs) != len(served.arrays):
        raise UnsupportedModelError(f"its graph has {len(graph.outputs)} outputs, not {', '.join(served.arrays)}")
    for port, name in zip(graph.outputs, served.arrays, strict=True):
        port.get_tensor().set_names({name})
    return graph


def _find_inputs(graph: Graph, names: Sequence[str]) -> list[Any]:
    """Return the inputs of these names or, if tracing has lost or exchanged names, all inputs in their order."""
    by_name = {known: port for port in graph.inputs for known in port.get_names()}
    return [by_name[name] for name in names] if by_name.keys() >= set(names) else list(graph.inputs)


def _has_full_attention(pipeline: BaseModel) -> bool:
    model = pipeline.transformers_model
    return (
        model is not None
        and model.config.model_type in _FULL_ATTENTION_TYPES
        and not getattr(model.config, "is_decoder", False)
    )


def _unmask_fully_masked_rows(graph: Graph) -> None:
    """Let tokens whose row of the attention mask is fully masked attend to all tokens.

    Such tokens are padding: before the first token of a left-padded text, or farther from the last one than a
    sliding window reaches. Their vectors are not used, but PyTorch makes them zero and OpenVINO makes them NaN, which
    spreads: through a mean that multiplies them by 0, or to all tokens in the next layer.
    """
    ops = openvino().opset13
    unmasked: dict[tuple[str, int], Any] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or node.get_input_size() < 4:
            continue
        mask = node.input_value(3)
        if mask.get_element_type() != openvino().Type.boolean:
            continue
        key = mask.get_node().get_friendly_name(), mask.get_index()
        if key not in unmasked:
            any_visible = ops.reduce_logical_or(mask, ops.constant([-1], dtype=np.int64), keep_dims=True)
            unmasked[key] = ops.logical_or(mask, ops.logical_not(any_visible)).output(0)
        node.input(3).replace_source_output(unmasked[key])


class _Tail(torch.nn.Module):
    """The stages of a pipeline after its transformer: token vectors and masks, or pooled vectors, to one vector per text."""

    def __init__(self, whole: PipelineModule, *, pooled: bool) -> None:
        super().__init__()
        self.whole = whole
        self.pooled = pooled

    def forward(
        self,
        vectors: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pooling_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        features = {SENTENCE_EMBEDDING if self.pooled else TOKEN_VECTORS: vectors, ATTENTION_MASK: attention_mask}
        return self.whole.run(features, list(self.whole.stages)[1:], pooling_mask)[0]


def _extend_prebuilt(path: Path, served: Served, on_step: Callable[[str], None]) -> Graph:
    """Append the later stages of a pipeline to a prebuilt export, which contains its transformer only.

    If the pipeline has no Pooling, the export contains it, too.
    """
    on_step(f"read {path.name}")
    ov = openvino()
    body = ov.Core().read_model(path)
    if served.arrays != (SENTENCE_EMBEDDING,):
        raise UnsupportedModelError("exports are used for dense vectors only")
    pipeline, whole = served.pipeline, PipelineModule(served)
    pools = any(isinstance(stage, Pooling) for stage in whole.stages)
    vectors = _vectors(body, _width(pipeline), rank=3 if pools else 2)
    masks = {name: value for name, value in whole.example().items() if name != INPUT_IDS}
    rows, length = masks[ATTENTION_MASK].shape
    width = int(vectors.get_partial_shape()[-1].get_length()) if not pools else _width(pipeline)
    example = torch.randn(rows, length, width) if pools else torch.randn(rows, width)
    tail = _trace(_Tail(whole, pooled=not pools), (example, *masks.values()) if pools else (example,), on_step)
    ids, mask = _connect_inputs(body)
    if vectors.get_element_type() != ov.Type.f32:
        vectors = ov.opset13.convert(vectors, "f32").output(0)
    names = ["vectors", *masks] if pools else ["vectors"]
    ports = _find_inputs(tail, names)
    ports[0].replace(vectors)
    if pools:
        ports[1].replace(mask.output(0))
    inputs = [ids, mask, *(port.get_node() for port in ports[2:])]
    graph = ov.Model([tail.outputs[0].get_node().input_value(0)], inputs, "joined")
    return _finalize(graph, [INPUT_IDS, ATTENTION_MASK, *names[2:]], served)


def has_token_vectors(path: Path) -> bool:
    """Return whether a prebuilt export returns token vectors, and not only one vector per text."""
    body = openvino().Core().read_model(path)
    return any(_rank(port) == 3 for port in body.outputs)


def _width(pipeline: BaseModel) -> int:
    first: Any = pipeline[0]
    return int(first.get_embedding_dimension())


def _vectors(body: Graph, width: int, *, rank: int) -> Any:
    """Return the value of the output of a rank: that with a usual name, else the only one."""
    found = [port for port in body.outputs if _rank(port) == rank]
    usual = [port for name in _OUTPUTS[rank] for port in found if name in port.get_names()]
    if not usual and len(found) != 1:
        outputs = ", ".join(f"{port.get_any_name()} {port.get_partial_shape()}" for port in body.outputs)
        raise UnsupportedModelError(
            f"it has none of the outputs {', '.join(_OUTPUTS[rank])} with {rank} dimensions; it has {outputs}"
        )
    port = (usual or found)[0]
    size = port.get_partial_shape()[-1]
    if rank == 3 and size.is_static and size.get_length() != width:
        raise UnsupportedModelError(
            f"its output {port.get_any_name()} has {size.get_length()} values per token, and the model has {width}"
        )
    if rank == 2 and size.is_dynamic:
        raise UnsupportedModelError(f"the size of its output {port.get_any_name()} is not fixed")
    return port.get_node().input_value(0)


def _rank(port: Any) -> int | None:
    shape = port.get_partial_shape()
    return int(shape.rank.get_length()) if shape.rank.is_static else None


def _connect_inputs(body: Graph) -> tuple[Any, Any]:
    """Connect the inputs of a prebuilt export with new ones for token ids and attention mask, and return these nodes.

    Token types are 0, and positions are those of the tokens that the mask does not hide.
    """
    ops = openvino().opset13
    ids, mask = (ops.parameter([-1, -1], dtype=np.int64, name=name) for name in (INPUT_IDS, ATTENTION_MASK))
    ports = {port.get_any_name(): port for port in body.inputs}
    if unknown := ports.keys() - {INPUT_IDS, ATTENTION_MASK, TOKEN_TYPES, _POSITIONS}:
        raise UnsupportedModelError(f"it has inputs that are not known here: {', '.join(sorted(unknown))}")
    zero, one = (ops.constant(value, dtype=np.int64) for value in (0, 1))
    for name, port in ports.items():
        if name == TOKEN_TYPES:
            value = ops.broadcast(zero, ops.shape_of(ids))
        elif name == _POSITIONS:
            value = ops.maximum(ops.subtract(ops.cum_sum(mask, one), one), zero)
        else:
            value = ids if name == INPUT_IDS else mask
        if port.get_element_type() != openvino().Type.i64:
            value = ops.convert(value, port.get_element_type())
        port.replace(value.output(0))
    return ids, mask
