"""Compiled at fp32, all families have the vectors of `encode` of sentence-transformers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pytest

from emb_model_provider.artifacts.manifest import WEIGHTS
from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.backends.tokenization import Tokenization
from tests.artifacts.helpers import FAMILY
from tests.backends.helpers import (
    DISTINCT,
    TEXTS,
    assert_same,
    cosines,
    embed_texts,
    highest_similarity,
    load_torch,
    reference,
)
from tests.marks import mark_slow_except
from tests.models import FAMILIES

if TYPE_CHECKING:
    from tests.artifacts.helpers import CompiledModels

SOME_FAMILIES = mark_slow_except(FAMILIES, FAMILY, "bert-prompts-excluded")
TOLERANCE = {"min_cosine": 0.9999, "norm_tolerance": 1e-3}


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_family_equals_sentence_transformers(family: str, compiled: CompiledModels) -> None:
    """For texts of all kinds, in one mixed batch and one by one."""
    model = compiled(family)
    expected = reference(model.directory).encode(TEXTS, batch_size=5, show_progress_bar=False)
    backend = model.load()
    together = embed_texts(backend, TEXTS)
    alone = np.concatenate([embed_texts(backend, [text]) for text in TEXTS])
    assert highest_similarity(expected[DISTINCT]) < 0.99
    assert_same(together, expected, **TOLERANCE)
    assert_same(alone, expected, **TOLERANCE)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_description_equals_that_of_the_torch_backend(family: str, compiled: CompiledModels) -> None:
    """Except for the backend and the fidelity."""
    model = compiled(family)
    torch = asdict(load_torch(model.directory).description)
    ours = asdict(model.description)
    assert {key for key, value in ours.items() if value != torch[key]} == {"backend", "fidelity"}
    fidelity = model.description.fidelity
    assert fidelity is not None
    assert 0.9999 <= fidelity.min_cosine <= fidelity.mean_cosine <= 1.0001
    assert fidelity.texts > 100


@pytest.mark.parametrize("family", mark_slow_except(["bert-prompts-excluded", "qwen3-left"], "bert-prompts-excluded"))
def test_prompts_equal_sentence_transformers(family: str, compiled: CompiledModels) -> None:
    """For each declared prompt, whether its tokens are pooled or excluded."""
    model = compiled(family)
    expected, backend = reference(model.directory), model.load()
    assert backend.description.prompts
    for name, prompt in backend.description.prompts.items():
        vectors = expected.encode(TEXTS, prompt_name=name, show_progress_bar=False)
        assert_same(embed_texts(backend, TEXTS, prompt=prompt), vectors, **TOLERANCE)


def test_prompts_of_different_lengths_share_a_batch(compiled: CompiledModels) -> None:
    """Each row excludes its own prompt."""
    backend = compiled("bert-prompts-excluded").load()
    tokenize = Tokenization(backend.description).encode
    text = "How do I reset my password?"
    prompts = ["passage: retrieve ", "", "query: ", "passage: retrieve "]
    rows = [tokenize([text], prompt=prompt, truncate="END") for prompt in prompts]
    mixed = backend.run(
        TokenBatch(ids=[row.ids[0] for row in rows], prompt_lengths=[row.prompt_lengths[0] for row in rows])
    ).dense
    single = [backend.run(TokenBatch(ids=row.ids, prompt_lengths=row.prompt_lengths)).dense[0] for row in rows]
    assert len({row.prompt_lengths[0] for row in rows}) == 3
    assert_same(mixed, np.stack(single), **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "auto", "fp16"])
def test_the_bundled_model_at_each_precision(precision: str, compiled: CompiledModels) -> None:
    """auto and fp16 compute in bf16 if the processor supports it natively."""
    model = compiled("bundled", precision=precision)
    texts = [*TEXTS, "word " * 600]
    expected = reference(model.directory).encode(texts, batch_size=4, show_progress_bar=False)
    assert cosines(embed_texts(model.load(), texts), expected).min() >= 0.9999
    description = model.description
    assert description.precision == ("bf16" if native_bf16() and precision != "fp32" else "fp32")
    assert (description.dimension, description.max_length, description.normalize) == (384, 256, True)
    assert description.fidelity is not None
    assert description.fidelity.min_cosine >= 0.9999
    assert model.artifact.made_by == "torch.export"


@pytest.mark.slow
def test_fp16_weights_take_half_the_space(compiled: CompiledModels) -> None:
    whole, half = (
        (compiled(FAMILY, precision=precision).artifact.directory / WEIGHTS).stat().st_size
        for precision in ("fp32", "fp16")
    )
    assert half < 0.6 * whole


def test_steps_are_reported_in_order(compiled: CompiledModels) -> None:
    """Each one when it begins."""
    steps = compiled(FAMILY).steps
    assert steps == ["load", "export", "convert", "save", "reference vectors", "verify", "write"]
