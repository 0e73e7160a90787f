"""Fused RMSNorm has the results of the modules of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from emb_model_provider.backends.pytorch.norms import FusedRMSNorm, fuse_norms
from tests.backends.helpers import TEXTS, cosines, embed_texts, load_torch
from tests.backends.pytorch.test_packing import OTHERS
from tests.backends.small_tokenizers import wordpiece
from tests.models import save_st

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COUNTS = {"llama": 5, "mistral": 5, "qwen2": 5, "gemma3_text": 13}
"""Two norms a layer and one at the end; Gemma has six a layer."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", COUNTS)
def test_vectors_are_those_of_the_separate_kernels(family: str, precision: str, tmp_path: Path) -> None:
    """With weights that are not 1, because the classes use them differently."""
    backend = load_torch(save_st(tmp_path / family, OTHERS[family], wordpiece()), precision=precision)
    pipeline = backend._pipeline
    assert pipeline is not None
    generator = torch.Generator().manual_seed(3)
    for name, parameter in pipeline.named_parameters():
        if "norm" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3
    expected = embed_texts(backend, TEXTS)
    assert fuse_norms(pipeline) == COUNTS[family]
    vectors = embed_texts(backend, TEXTS)
    assert cosines(vectors, expected).min() >= (0.999999 if precision == "fp32" else 0.99)
    assert fuse_norms(pipeline) == 0


def test_qwen3_has_norms_of_queries_and_keys(family_directory: Callable[[str], Path]) -> None:
    backend = load_torch(family_directory("qwen3-left"))
    expected = embed_texts(backend, TEXTS)
    assert fuse_norms(backend._pipeline) == 9  # type: ignore[arg-type]  # it is loaded
    assert cosines(embed_texts(backend, TEXTS), expected).min() >= 0.999999


def test_models_without_such_norms_are_unchanged(family_directory: Callable[[str], Path]) -> None:
    backend = load_torch(family_directory("bert-cls"))
    expected = embed_texts(backend, TEXTS)
    assert fuse_norms(backend._pipeline) == 0  # type: ignore[arg-type]  # it is loaded
    np.testing.assert_array_equal(embed_texts(backend, TEXTS), expected)


def test_a_norm_that_computes_something_else_is_kept(family_directory: Callable[[str], Path]) -> None:
    """Its results are compared."""

    class OtherRMSNorm(Qwen3RMSNorm):  # type: ignore[misc]  # transformers leaves it untyped
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 1.05  # type: ignore[no-any-return]  # likewise

    OtherRMSNorm.__module__ = Qwen3RMSNorm.__module__
    pipeline = load_torch(family_directory("qwen3-left"))._pipeline
    assert pipeline is not None
    pipeline[0].model.norm = OtherRMSNorm(48)
    assert fuse_norms(pipeline) == 8
    assert isinstance(pipeline[0].model.norm, OtherRMSNorm)
    assert isinstance(pipeline[0].model.layers[0].input_layernorm, FusedRMSNorm)
