"""The torch backend on CUDA: the same vectors as sentence-transformers on a CPU, at every precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.backends.pytorch.packing import varlen_available, varlen_kernel
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import DeviceUnavailableError, InferenceError, LoadError
from emb_model_provider.serving.batch_runner import is_out_of_memory
from tests.backends.comparison import TEXTS, cosines, embed_texts, reference
from tests.backends.test_torch_packing import one_by_one
from tests.models import FAMILIES, bundled_directory, snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def load(directory: Path, **spec: object) -> TorchBackend:
    return TorchBackend(
        spec_of(**{"device": "cuda", **spec}), snapshot_of(directory), trust_remote_code=False
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_sentence_transformers_in_fp32(
    family: str, family_directory: Callable[[str], Path]
) -> None:
    """fp32 on CUDA gives the CPU reference's vectors and norms."""
    directory = family_directory(family)
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    vectors = embed_texts(load(directory, precision="fp32"), TEXTS)
    assert cosines(vectors, expected).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-3)


# The small models' wide random weights magnify rounding far beyond what a trained model shows.
@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.98), ("fp16", 0.999)])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_in_half_precision_stays_near_fp32(
    family: str, precision: str, bound: float, family_directory: Callable[[str], Path]
) -> None:
    """bf16 and fp16 run on every family and stay within a stated cosine of fp32."""
    directory = family_directory(family)
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    vectors = embed_texts(load(directory, precision=precision), TEXTS)
    assert vectors.dtype == np.float32
    assert cosines(vectors, expected).min() >= bound


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.99), ("fp16", 0.9999), ("auto", 0.99)])
def test_the_bundled_model_in_half_precision(precision: str, bound: float) -> None:
    """A trained model stays within a stated cosine of fp32; auto takes what the device is good at."""
    texts = [text for text in TEXTS if text.strip()]
    expected = reference(bundled_directory()).encode(texts, show_progress_bar=False)
    backend = load(bundled_directory(), precision=precision)
    assert cosines(embed_texts(backend, texts), expected).min() >= bound
    if precision == "auto":
        major, _ = torch.cuda.get_device_capability(0)
        assert backend.description.precision == ("bf16" if major >= 8 else "fp16")
    assert backend.description.device == "cuda:0"


def test_auto_takes_the_cuda_device() -> None:
    """Without a word from the operator the model runs on the GPU."""
    assert load(bundled_directory(), device="auto").description.device == "cuda:0"


def test_a_device_that_is_not_there_is_refused() -> None:
    """The message names the devices that are."""
    with pytest.raises(DeviceUnavailableError, match="cuda:0"):
        load(bundled_directory(), device="cuda:63")


def test_an_unknown_token_does_not_end_the_cuda_context() -> None:
    """It is refused before the lookup, which on CUDA would fail every later call of the process."""
    backend = load(bundled_directory())
    with pytest.raises(InferenceError):
        backend.embed(TokenBatch(ids=[[10**6]], prompt_lengths=[0]))
    assert np.isfinite(backend.embed(TokenBatch(ids=[[101, 102]], prompt_lengths=[0]))).all()


def test_out_of_memory_is_told_apart_and_passes() -> None:
    """A batch that is too large for the device fails as out of memory, and smaller ones run after it."""
    backend = load(bundled_directory())
    large = TokenBatch(ids=[[101, *[2023] * 254, 102]] * 4096, prompt_lengths=[0] * 4096)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 2**28) / total))
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            backend.embed(large)
        assert is_out_of_memory(caught.value)
        assert np.isfinite(backend.embed(TokenBatch(ids=[[101, 102]], prompt_lengths=[0]))).all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_fp32_is_had_from_a_model_in_half_precision() -> None:
    """What is recomputed is as the CPU's fp32, whether rows are packed or padded."""
    texts = [text for text in TEXTS if text.strip()]
    expected = reference(bundled_directory()).encode(texts, show_progress_bar=False)
    backend = load(bundled_directory(), precision="fp16")
    ids = Tokenization(backend.description).encode(texts, truncate="END").ids
    batch = TokenBatch(ids=ids, prompt_lengths=[0] * len(ids))
    assert cosines(backend.embed_fp32(batch), expected).min() >= 0.99999


def test_closing_frees_the_memory() -> None:
    """What the model held on the device is given back."""
    before = torch.cuda.memory_allocated()
    backend = load(bundled_directory())
    assert torch.cuda.memory_allocated() > before
    backend.close()
    assert torch.cuda.memory_allocated() <= before


# --- int8 and int4 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.95), ("int4", 0.7)])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_integers(
    family: str, precision: str, bound: float, family_directory: Callable[[str], Path]
) -> None:
    """int8 and int4 run on every family and stay within a stated cosine of fp32."""
    expected = reference(family_directory(family)).encode(TEXTS, show_progress_bar=False)
    backend = load(family_directory(family), precision=precision)
    assert (backend.description.precision, backend.description.device) == (precision, "cuda:0")
    assert cosines(embed_texts(backend, TEXTS), expected).min() >= bound


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.99), ("int4", 0.92)])
def test_the_bundled_model_in_integers(precision: str, bound: float) -> None:
    """A trained model stays within a stated cosine of fp32."""
    texts = [text for text in TEXTS if text.strip()]
    expected = reference(bundled_directory()).encode(texts, show_progress_bar=False)
    assert (
        cosines(embed_texts(load(bundled_directory(), precision=precision), texts), expected).min() >= bound
    )


def test_integers_save_memory() -> None:
    """On the device fp32, half, int8 and int4 take less in that order; loading never holds more than half would."""
    held, peak = {}, {}
    for precision in ("fp32", "auto", "int8", "int4"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        backend = load(bundled_directory(), precision=precision)
        held[precision] = torch.cuda.memory_allocated() - before
        peak[precision] = torch.cuda.max_memory_allocated() - before
        backend.close()
    assert held["fp32"] > held["auto"] > held["int8"] > held["int4"]
    assert held["int8"] < 0.7 * held["auto"]
    assert peak["int4"] < 2 * peak["auto"]


# --- attention ------------------------------------------------------------------------------------------

PACKED = [
    "bert-mean-normalize",
    "bert-cls",
    "bert-dense",
    "bert-prompts-excluded",
    "xlm-roberta",
    "modernbert",
]
PACKED += ["qwen3-left", "qwen3-right"]


def needs_varlen() -> None:
    if not varlen_available(torch.device("cuda:0")):
        pytest.skip("this device or PyTorch has no variable-length attention")


@pytest.mark.parametrize(
    ("heads", "shared", "width", "window"),
    [
        (4, 4, 64, (-1, -1)),
        (4, 2, 128, (-1, 0)),
        (4, 4, 12, (-1, -1)),
        (4, 4, 64, (8, 8)),
        (4, 2, 64, (8, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_attends_within_each_input(
    heads: int, shared: int, width: int, window: tuple[int, int], dtype: torch.dtype
) -> None:
    """PyTorch's kernel gives what attention input by input gives: full, causal, windowed, grouped, odd widths."""
    needs_varlen()
    torch.manual_seed(1)
    lengths = [1, 5, 64, 200, 17]
    starts = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    query, key, value = (torch.randn(sum(lengths), count, width) for count in (heads, shared, shared))
    # On the CPU, in fp32, from the same rounded numbers.
    bucket_length = [x.to(dtype) for x in (query, key, value)]
    expected = one_by_one(*(x.float() for x in bucket_length), starts, 200, scale=0.2, window=window)
    found = varlen_kernel(*(x.cuda() for x in bucket_length), starts.cuda(), 200, scale=0.2, window=window)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float().cpu(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("family", PACKED)
def test_known_families_are_not_padded(
    family: str, precision: str, family_directory: Callable[[str], Path]
) -> None:
    """At half precision, and with integer weights, they run packed; notes would say if they had not agreed."""
    needs_varlen()
    backend = load(family_directory(family), precision=precision)
    assert backend.packs, backend.description.notes


def test_packed_vectors_equal_the_reference() -> None:
    """The bundled model, packed in fp16, stays as near to fp32 as padded, alone and in a batch."""
    needs_varlen()
    texts = [text for text in TEXTS if text.strip()]
    expected = reference(bundled_directory()).encode(texts, show_progress_bar=False)
    backend = load(bundled_directory(), precision="fp16")
    assert backend.packs
    alone = np.concatenate([embed_texts(backend, [text]) for text in texts])
    assert cosines(embed_texts(backend, texts), expected).min() >= 0.9999
    assert cosines(alone, expected).min() >= 0.9999


@pytest.mark.parametrize(("family", "precision"), [("mpnet", "bf16"), ("bert-cls", "fp32")])
def test_what_cannot_be_packed_is_padded(
    family: str, precision: str, family_directory: Callable[[str], Path]
) -> None:
    """A bias by relative position, or fp32, is served padded, without a note."""
    backend = load(family_directory(family), precision=precision)
    assert not backend.packs
    assert backend.description.notes == ()


def test_padded_models_use_pytorchs_fused_attention(family_directory: Callable[[str], Path]) -> None:
    """Not transformers' eager attention, which writes out every score."""
    backend = load(family_directory("bert-cls"), precision="fp32")
    assert backend._pipeline is not None
    model = backend._pipeline.transformers_model
    assert model is not None
    assert model.config._attn_implementation == "sdpa"


# --- memory ---------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_says_so() -> None:
    """The message names what to set: a lower precision, another device, a smaller model."""
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


def test_a_batch_that_does_not_fit_leaves_the_backend_usable() -> None:
    """Running out of memory is an error of that batch: the next one is answered."""
    backend = load(bundled_directory(), precision="fp32")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 2**24) / total))
    batch = TokenBatch(ids=[[5] * 256] * 512, prompt_lengths=[0] * 512)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            backend.embed(batch)
        assert np.isfinite(backend.embed(TokenBatch(ids=[[5, 6]], prompt_lengths=[0]))).all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert backend.embed(batch).shape == (512, 384)
