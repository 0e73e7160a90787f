"""The memory of a model is estimated from its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import pytest

from emb_model_provider.backends.memory_estimate import (
    activation_bytes,
    device_batch_tokens,
    expected_bytes,
    minimum_bytes,
    openvino_bytes,
    torch_bytes,
)
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.repository import Repository
from tests.backends.helpers import description, load_torch
from tests.models import bundled_directory, snapshot_of

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20


def graph(directory: Path, width: int, *, fp16: bool = False) -> Path:
    """Write a graph of one table of 100 rows and one square matrix."""
    ops = ov.opset13
    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    ids.output(0).get_tensor().set_names({"input_ids"})
    mask = ops.parameter([-1, -1], np.int64, name="attention_mask")
    mask.output(0).get_tensor().set_names({"attention_mask"})
    rng = np.random.default_rng(3)
    table, matrix = (rng.normal(size=(rows, width)).astype(np.float32) for rows in (100, width))
    rows = ops.multiply(
        ops.gather(ops.constant(table), ids, ops.constant(0)), ops.unsqueeze(ops.convert(mask, "f32"), ops.constant(2))
    )
    summed = ops.reduce_sum(ops.matmul(rows, ops.constant(matrix), False, True), ops.constant(1))
    path = directory / f"{width}.xml"
    ov.save_model(ov.Model([summed], [ids, mask]), path, compress_to_fp16=fp16)
    return path


@pytest.mark.parametrize("fp16", [False, True])
def test_a_graph_takes_its_file_and_copies_of_its_matrices(tmp_path: Path, fp16: bool) -> None:
    """The difference between two graphs is that of their files and of five copies of their matrices at fp32: two for short inputs."""
    memory, stored = {}, {}
    for width in (64, 512):
        path = graph(tmp_path, width, fp16=fp16)
        backend = OpenVinoBackend(path, description(dimension=width, vocab_size=100), cpus=2)
        memory[width], stored[width] = backend.memory_bytes, path.with_suffix(".bin").stat().st_size
        backend.close()
    matrices = 512**2 - 64**2
    assert memory[512] - memory[64] == stored[512] - stored[64] + 5 * 4 * matrices


def test_a_pipeline_takes_the_memory_of_its_parameters() -> None:
    """At half precision it takes half as much, and with integer weights less than that."""
    memory = {}
    for precision in ("fp32", "bf16", "int8"):
        backend = load_torch(bundled_directory(), precision=precision)
        memory[precision] = backend.memory_bytes
        backend.close()
    parameters = 22_713_216
    assert parameters * 4 < memory["fp32"] < parameters * 4 + 64 * MIB
    assert memory["fp32"] - memory["bf16"] == pytest.approx(2 * parameters, rel=0.01)
    assert memory["int8"] < memory["bf16"]


def test_the_tokenizer_is_included() -> None:
    """A Unigram tokenizer with many entries takes more memory than small models."""
    bpe = description(vocab_size=250_000, tokenizer_json='{"model":{"type":"BPE"}}')
    unigram = replace(bpe, tokenizer_json='{"model": {"type": "Unigram"}}')
    difference = openvino_bytes(0, 0, 0, "bf16", unigram) - openvino_bytes(0, 0, 0, "bf16", bpe)
    assert difference > 150 * MIB


def test_the_minimum_is_not_higher_than_the_actual_memory() -> None:
    """Otherwise models that fit would be refused."""
    size = sum(file.size for file in snapshot_of(bundled_directory()).files)
    item_bytes = {"fp32": 4, "bf16": 2, "auto": 2, "fp16": 2, "int8": 1, "int4": 0.5}
    for precision, item in item_bytes.items():
        assert minimum_bytes("torch", size, precision) <= 22_713_216 * item + 2 * MIB  # type: ignore[arg-type]  # Precision
        assert minimum_bytes("torch", size, precision) < expected_bytes("torch", size, precision)  # type: ignore[arg-type]  # likewise
    assert minimum_bytes("openvino", 10, "int4") == 10 < expected_bytes("openvino", 10, "int4")


@pytest.mark.parametrize(
    ("config", "item_bytes", "expected"),
    [
        ({"hidden_size": 1024, "intermediate_size": 4096}, 2, 2 * (8 * 1024 + 3 * 4096) + 4 * 1024),
        ({"dim": 768, "hidden_dim": 3072}, 4, 4 * (8 * 768 + 3 * 3072) + 4 * 768),
        ({"hidden_size": 100}, 2, 2 * (8 * 100 + 3 * 400) + 4 * 100),
    ],
)
def test_activations_depend_on_the_widths_of_a_model(
    config: dict[str, int], item_bytes: int, expected: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert activation_bytes(Repository.of(snapshot_of(tmp_path)), item_bytes) == expected


def test_the_batches_of_all_streams_fit_into_the_free_memory_of_a_gpu() -> None:
    """With room to spare. A GPU that is full still gets small batches, which fail only if they do not fit."""
    free, token = 8 * 2**30, 45_000
    one, two = (device_batch_tokens(free, token, streams) for streams in (1, 2))
    assert 0.6 * free < one * token < 0.8 * free
    assert two == one // 2
    assert device_batch_tokens(0, token, 2) == 512


def test_a_model_on_a_gpu_takes_its_weights_and_its_batches() -> None:
    """Its tokenizers are in the memory of the machine."""
    assert torch_bytes(1000, description(), 500) == 1500
    assert torch_bytes(1000, description()) > 20 * MIB
