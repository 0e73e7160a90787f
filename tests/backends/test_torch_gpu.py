"""The torch backend on CUDA: the same vectors as sentence-transformers on a CPU, at every precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.torch_backend import TorchBackend
from emb_model_provider.errors import DeviceUnavailableError, InferenceError
from tests.backends.comparison import TEXTS, cosines, embed_texts, reference
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


def test_closing_frees_the_memory() -> None:
    """What the model held on the device is given back."""
    before = torch.cuda.memory_allocated()
    backend = load(bundled_directory())
    assert torch.cuda.memory_allocated() > before
    backend.close()
    assert torch.cuda.memory_allocated() <= before
