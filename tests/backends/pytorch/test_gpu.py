"""The torch backend on CUDA: accuracy, packing and memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.pytorch.packing import varlen_available, varlen_kernel
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import DeviceUnavailableError, InferenceError, LoadError
from emb_model_provider.serving.batch_runner import is_out_of_memory
from tests.backends.helpers import (
    TEXTS,
    cosines,
    embed_texts,
    load_torch,
    load_torch_pipeline,
    reference,
    reference_kernel,
)
from tests.models import FAMILIES, bundled_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.backends.pytorch.backend import TorchBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # bitsandbytes warns of widths that are no multiple of 32, such as those of the small models.
    pytest.mark.filterwarnings("ignore:.*inner dimension:UserWarning"),
]


def load(directory: Path, **spec: object) -> TorchBackend:
    return load_torch(directory, **{"device": "cuda", **spec})


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_sentence_transformers_at_fp32(family: str, family_directory: Callable[[str], Path]) -> None:
    """Vectors and norms are those of the reference on the CPU."""
    directory = family_directory(family)
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    vectors = embed_texts(load(directory, precision="fp32"), TEXTS)
    assert cosines(vectors, expected).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-3)


# Rounding has more effect on the wide random weights of the small models than on trained weights.
@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.98), ("fp16", 0.999)])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_at_half_precision_are_close_to_fp32(
    family: str, precision: str, bound: float, family_directory: Callable[[str], Path]
) -> None:
    directory = family_directory(family)
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    vectors = embed_texts(load(directory, precision=precision), TEXTS)
    assert vectors.dtype == np.float32
    assert cosines(vectors, expected).min() >= bound


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.99), ("fp16", 0.9999), ("auto", 0.99)])
def test_the_bundled_model_at_half_precision_is_close_to_fp32(precision: str, bound: float) -> None:
    """auto is fp16 for a model that is stored at fp32."""
    texts = [text for text in TEXTS if text.strip()]
    expected = reference(bundled_directory()).encode(texts, show_progress_bar=False)
    backend = load(bundled_directory(), precision=precision)
    assert cosines(embed_texts(backend, texts), expected).min() >= bound
    if precision == "auto":
        assert backend.description.precision == "fp16"
    assert backend.description.device == "cuda:0"


def test_auto_uses_the_cuda_device() -> None:
    assert load(bundled_directory(), device="auto").description.device == "cuda:0"


def test_a_missing_device_is_an_error() -> None:
    """The message names the devices of this machine."""
    with pytest.raises(DeviceUnavailableError, match="cuda:0"):
        load(bundled_directory(), device="cuda:63")


def test_an_invalid_token_does_not_break_the_cuda_context() -> None:
    """It is rejected before the lookup, after which all later calls of the process would fail."""
    backend = load(bundled_directory())
    with pytest.raises(InferenceError):
        backend.run(TokenBatch(ids=[[10**6]], prompt_lengths=[0]))
    assert np.isfinite(backend.run(TokenBatch(ids=[[101, 102]], prompt_lengths=[0])).dense).all()


def test_out_of_memory_is_recognized() -> None:
    """A batch that is too large for the device fails, and a smaller one runs after it."""
    backend = load(bundled_directory())
    large = TokenBatch(ids=[[101, *[2023] * 254, 102]] * 4096, prompt_lengths=[0] * 4096)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 2**28) / total))
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            backend.run(large)
        assert is_out_of_memory(caught.value)
        assert np.isfinite(backend.run(TokenBatch(ids=[[101, 102]], prompt_lengths=[0])).dense).all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_embed_fp32_of_a_model_at_half_precision() -> None:
    """The vectors are those at fp32 on the CPU, even if the model is packed."""
    texts = [text for text in TEXTS if text.strip()]
    expected = reference(bundled_directory()).encode(texts, show_progress_bar=False)
    backend = load(bundled_directory(), precision="fp16")
    ids = Tokenization(backend.description).encode(texts, truncate="END").ids
    batch = TokenBatch(ids=ids, prompt_lengths=[0] * len(ids))
    assert cosines(backend.run_fp32(batch).dense, expected).min() >= 0.99999


def test_two_streams_compute_the_same_vectors(family_directory: Callable[[str], Path]) -> None:
    """Each thread has a CUDA stream of its own."""
    backend = load(family_directory("qwen3-left"), precision="fp16")
    assert backend.streams == 2
    batches = [TokenBatch(ids=[[5 + size] * size] * 40, prompt_lengths=[0] * 40) for size in range(1, 40)]
    expected = [backend.run(batch).dense for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        for vectors, outputs in zip(expected, pool.map(backend.run, batches), strict=True):
            assert cosines(outputs.dense, vectors).min() >= 0.9999


def test_the_largest_batch_fits_into_the_free_memory(family_directory: Callable[[str], Path]) -> None:
    """It is derived from the memory of the device after loading."""
    backend = load(family_directory("bert-cls"), precision="fp16")
    tokens = backend.description.max_batch_tokens
    assert tokens is not None
    free, total = torch.cuda.mem_get_info()
    assert 512 <= tokens < total
    assert backend.memory_bytes < free


def test_closing_frees_the_memory() -> None:
    load(bundled_directory()).close()  # allocates what cuBLAS keeps
    before = torch.cuda.memory_allocated()
    backend = load(bundled_directory())
    assert torch.cuda.memory_allocated() > before
    backend.close()
    assert torch.cuda.memory_allocated() <= before


# --- int8 and int4 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.95), ("int4", 0.5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_integer_weights(
    family: str, precision: str, bound: float, family_directory: Callable[[str], Path]
) -> None:
    expected = reference(family_directory(family)).encode(TEXTS, show_progress_bar=False)
    backend = load(family_directory(family), precision=precision)
    assert (backend.description.precision, backend.description.device) == (precision, "cuda:0")
    assert cosines(embed_texts(backend, TEXTS), expected).min() >= bound


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.99), ("int4", 0.92)])
def test_the_bundled_model_with_integer_weights(precision: str, bound: float) -> None:
    texts = [text for text in TEXTS if text.strip()]
    expected = reference(bundled_directory()).encode(texts, show_progress_bar=False)
    assert cosines(embed_texts(load(bundled_directory(), precision=precision), texts), expected).min() >= bound


def test_integer_weights_save_memory() -> None:
    """fp32, half precision, int8 and int4 take less in that order; quantizing does not take more than half precision."""
    used, peak = {}, {}
    for precision in ("fp32", "auto", "int8", "int4"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        backend = load(bundled_directory(), precision=precision)
        used[precision] = torch.cuda.memory_allocated() - before
        peak[precision] = torch.cuda.max_memory_allocated() - before
        backend.close()
    assert used["fp32"] > used["auto"] > used["int8"] > used["int4"]
    assert used["int8"] < 0.7 * used["auto"]
    assert peak["int4"] < 2 * peak["auto"]


# --- attention ------------------------------------------------------------------------------------------

PACKED = ["bert-mean-normalize", "bert-cls", "bert-dense", "bert-prompts-excluded", "xlm-roberta", "modernbert"]
PACKED += ["qwen3-left", "qwen3-right"]


def needs_varlen() -> None:
    if not varlen_available(torch.device("cuda:0")):
        pytest.skip("this device or PyTorch version does not support variable-length attention")


@pytest.mark.parametrize(
    ("heads", "shared", "width", "window"),
    [(4, 4, 64, (-1, -1)), (4, 2, 128, (-1, 0)), (4, 4, 12, (-1, -1)), (4, 4, 64, (8, 8)), (4, 2, 64, (8, 0))],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_equals_the_reference(
    heads: int, shared: int, width: int, window: tuple[int, int], dtype: torch.dtype
) -> None:
    """Full, causal, windowed and grouped attention, and head widths that must be padded."""
    needs_varlen()
    torch.manual_seed(1)
    lengths = [1, 5, 64, 200, 17]
    starts = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    query, key, value = (torch.randn(sum(lengths), count, width) for count in (heads, shared, shared))
    # The reference runs on the CPU at fp32, with the same rounded values.
    rounded = [x.to(dtype) for x in (query, key, value)]
    expected = reference_kernel(*(x.float() for x in rounded), starts, 200, scale=0.2, window=window)
    attended = varlen_kernel(*(x.cuda() for x in rounded), starts.cuda(), 200, scale=0.2, window=window)
    assert attended.shape == expected.shape
    torch.testing.assert_close(attended.float().cpu(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("family", PACKED)
def test_supported_families_are_packed(family: str, precision: str, family_directory: Callable[[str], Path]) -> None:
    """At half precision and with integer weights. Otherwise a note says why they are not."""
    needs_varlen()
    backend = load(family_directory(family), precision=precision)
    assert backend.packs, backend.description.notes


def test_packed_vectors_equal_the_reference() -> None:
    """The bundled model at fp16, alone and in a batch."""
    needs_varlen()
    texts = [text for text in TEXTS if text.strip()]
    expected = reference(bundled_directory()).encode(texts, show_progress_bar=False)
    backend = load(bundled_directory(), precision="fp16")
    assert backend.packs
    alone = np.concatenate([embed_texts(backend, [text]) for text in texts])
    assert cosines(embed_texts(backend, texts), expected).min() >= 0.9999
    assert cosines(alone, expected).min() >= 0.9999


@pytest.mark.parametrize(("family", "precision"), [("mpnet", "bf16"), ("bert-cls", "fp32")])
def test_other_models_are_padded(family: str, precision: str, family_directory: Callable[[str], Path]) -> None:
    """Those with relative position biases, and those at fp32, without a note."""
    backend = load(family_directory(family), precision=precision)
    assert not backend.packs
    assert backend.description.notes == ()


def test_padded_models_use_pytorchs_fused_attention(family_directory: Callable[[str], Path]) -> None:
    """And not eager attention, which stores all scores."""
    model = load_torch_pipeline(family_directory("bert-cls"), device="cuda").transformers_model
    assert model is not None
    assert model.config._attn_implementation == "sdpa"


# --- memory ---------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_an_error() -> None:
    """The message says what to set."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 2**20) / total))
    try:
        with pytest.raises(LoadError, match=r"does not fit.*EMB_PROVIDER_MODEL_PRECISION"):
            load(bundled_directory(), precision="fp32")
        with pytest.raises(LoadError, match=r"does not fit.*EMB_PROVIDER_MODEL_PRECISION"):
            load(bundled_directory(), precision="int8")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert load(bundled_directory()).description.device == "cuda:0"


def test_the_backend_is_usable_after_running_out_of_memory() -> None:
    """Only the batch that does not fit fails."""
    backend = load(bundled_directory(), precision="fp32")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 2**24) / total))
    batch = TokenBatch(ids=[[5] * 256] * 512, prompt_lengths=[0] * 512)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            backend.run(batch)
        assert np.isfinite(backend.run(TokenBatch(ids=[[5, 6]], prompt_lengths=[0])).dense).all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert backend.run(batch).dense.shape == (512, 384)
