"""What a model takes in memory is reckoned from what its backend holds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import pytest

from emb_model_provider.backends.memory_estimate import expected_bytes, minimum_bytes, openvino_bytes
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.pytorch.backend import TorchBackend
from tests.models import bundled_directory, snapshot_of, spec_of
from tests.serving.fakes import describe

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
        ops.gather(ops.constant(table), ids, ops.constant(0)),
        ops.unsqueeze(ops.convert(mask, "f32"), ops.constant(2)),
    )
    summed = ops.reduce_sum(ops.matmul(rows, ops.constant(matrix), False, True), ops.constant(1))
    path = directory / f"{width}.xml"
    ov.save_model(ov.Model([summed], [ids, mask]), path, compress_to_fp16=fp16)
    return path


@pytest.mark.parametrize("fp16", [False, True])
def test_graph_takes_its_file_and_copies_of_its_matrices(tmp_path: Path, fp16: bool) -> None:
    """Of two graphs the larger takes more by the difference of their files, and of their matrices as they are computed."""
    taken, stored = {}, {}
    for width in (64, 512):
        path = graph(tmp_path, width, fp16=fp16)
        backend = OpenVinoBackend(path, replace(describe(), dimension=width, vocab_size=100), cpus=2)
        taken[width], stored[width] = backend.memory_bytes, path.with_suffix(".bin").stat().st_size
        backend.close()
    matrices = 512**2 - 64**2
    assert taken[512] - taken[64] == stored[512] - stored[64] + 3 * 4 * matrices


def test_pipeline_takes_what_its_parameters_do() -> None:
    """At half the bytes a parameter a model takes that much less; as integers, less again."""
    taken = {}
    for precision in ("fp32", "bf16", "int8"):
        spec = spec_of(precision=precision, backend="torch", device="cpu")
        backend = TorchBackend(spec, snapshot_of(bundled_directory()), trust_remote_code=False)
        taken[precision] = backend.memory_bytes
        backend.close()
    parameters = 22_713_216
    assert parameters * 4 < taken["fp32"] < parameters * 4 + 64 * MIB
    assert taken["fp32"] - taken["bf16"] == pytest.approx(2 * parameters, rel=0.01)
    assert taken["int8"] < taken["bf16"]


def test_tokenizer_counts() -> None:
    """A Unigram tokenizer of many entries takes more than small models do, and is not left out."""
    plain = replace(describe(), vocab_size=250_000, tokenizer_json='{"model":{"type":"BPE"}}')
    unigram = replace(plain, tokenizer_json='{"model": {"type": "Unigram"}}')
    more = openvino_bytes(0, 0, 0, "bf16", unigram) - openvino_bytes(0, 0, 0, "bf16", plain)
    assert more > 150 * MIB


def test_least_is_no_more_than_what_is_held() -> None:
    """A guess before the load that is too high would refuse models that fit."""
    size = sum(file.size for file in snapshot_of(bundled_directory()).files)
    held = {"fp32": 4, "bf16": 2, "auto": 2, "fp16": 2, "int8": 1, "int4": 0.5}
    for precision, item in held.items():
        assert minimum_bytes("torch", size, precision) <= 22_713_216 * item + 2 * MIB  # type: ignore[arg-type]  # Precision
        assert minimum_bytes("torch", size, precision) < expected_bytes("torch", size, precision)  # type: ignore[arg-type]  # likewise
    assert minimum_bytes("openvino", 10, "int4") == 10 < expected_bytes("openvino", 10, "int4")
