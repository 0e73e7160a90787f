"""Failures within a batch: inputs that fail, vectors that are not finite, batches that do not fit into memory."""

from __future__ import annotations

import asyncio

import pytest

from emb_model_provider.errors import InferenceError
from emb_model_provider.serving.batch_runner import is_device_lost, is_out_of_memory
from tests.serving.fakes import FAILS, NEVER_FINITE, NOT_FINITE, expected
from tests.serving.helpers import expected_vectors, ids, started_engine

pytestmark = pytest.mark.usefixtures("short_collections")


async def test_failing_input_fails_only_its_request() -> None:
    """A batch that fails is bisected: the other requests of the batch get their vectors."""
    async with started_engine() as run:
        holding = await run.hold()
        good = [asyncio.create_task(run.embed(f"w{n} w{n}")) for n in range(20)]
        bad = asyncio.create_task(run.embed("w7 w7", FAILS, "w8 w8"))
        await run.until_waiting(23)
        run.backend.gate.set()
        await holding
        with pytest.raises(InferenceError, match="RuntimeError"):
            await bad
        assert [(await task)[0].tolist() for task in good] == expected_vectors(20)
        assert any(record.failed for record in run.records)
        assert (await run.embed("w1")).tolist() == [expected(ids("w1"))]


async def test_vector_that_is_not_finite_is_computed_again_at_fp32() -> None:
    """An overflow of the smaller type does not affect the result, nor the other requests of the batch."""
    async with started_engine() as run:
        tasks = await run.embed_together(3, f"w5 {NOT_FINITE}")
        vectors = [(await task)[0].tolist() for task in tasks]
        assert vectors == [*expected_vectors(3), expected(ids("w5", NOT_FINITE))]


async def test_vector_that_is_not_finite_at_fp32_fails_its_request() -> None:
    """It fails its own request only, and does not restart the model."""
    async with started_engine() as run:
        *good, bad = await run.embed_together(3, NEVER_FINITE)
        with pytest.raises(InferenceError, match="not finite"):
            await bad
        assert [(await task)[0].tolist() for task in good] == expected_vectors(3)
        assert not run.changes


async def test_batches_stay_small_after_one_did_not_fit_into_memory() -> None:
    """No request fails if smaller batches fit, and the next batches are small from the start."""
    async with started_engine() as run:
        run.backend.max_tokens = 20
        tasks = await run.embed_together(32)
        assert [(await task)[0].tolist() for task in tasks] == expected_vectors(32)
        run.backend.batches.clear()
        tasks = await run.embed_together(32)
        assert [(await task)[0].tolist() for task in tasks] == expected_vectors(32)
        assert max(len(batch) * len(batch[0]) for batch in run.backend.batches) <= 20


async def test_single_input_that_does_not_fit_leaves_other_batches_large() -> None:
    """An input that does not fit into memory alone fails, and the limit of batches is not lowered."""
    async with started_engine() as run:
        run.backend.max_tokens = 15
        holding = await run.hold()
        bad = asyncio.create_task(run.embed(" ".join(["w1"] * 14)))
        await run.until_waiting(1)
        run.backend.gate.set()
        await holding
        with pytest.raises(InferenceError):
            await bad
        run.backend.max_tokens = None
        run.backend.batches.clear()
        tasks = await run.embed_together(32)
        assert [(await task)[0].tolist() for task in tasks] == expected_vectors(32)
        assert max(map(len, run.backend.batches)) == 32


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "memory"),
        ("CUDA error: out of memory", "memory"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "memory"),
        ("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory", "memory"),
        ("CUDA error: an illegal memory access was encountered", "device"),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", "device"),
        ("CUDA error: uncorrectable ECC error encountered", "device"),
        ("CUDA error: invalid configuration argument", "input"),
        ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`", "input"),
        ("The size of tensor a (3) must match the size of tensor b (4)", "input"),
    ],
)
def test_errors_of_a_gpu_are_distinguished(message: str, kind: str) -> None:
    """A smaller batch can succeed after those of memory, none after those of the device."""
    error = RuntimeError(message)
    assert (is_out_of_memory(error), is_device_lost(error)) == (kind == "memory", kind == "device")
