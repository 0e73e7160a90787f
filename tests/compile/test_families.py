"""Compiled at fp32, every family gives what sentence-transformers' own `encode` gives."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pytest

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.backends.tokenization import Tokenization
from tests.backends.comparison import TEXTS, cosines, embed_texts, reference, spread
from tests.models import FAMILIES, snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tests.compile.conftest import Compiled

UNLIKE = [0, 1, 2, 3, 4, 5, 10, 11]
"""Texts that a model must tell apart for a comparison to mean something."""


def assert_same(ours: NDArray[np.float32], theirs: NDArray[np.float32], *, least: float = 0.9999) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    assert cosines(ours, theirs).min() >= least
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1), rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_sentence_transformers(family: str, compiled: Callable[..., Compiled]) -> None:
    """Texts of every kind, in one mixed batch and one by one, get sentence-transformers' vectors."""
    made = compiled(family, precision="fp32")
    expected = reference(made.directory).encode(TEXTS, batch_size=5, show_progress_bar=False)
    backend = made.load()
    together = embed_texts(backend, TEXTS)
    alone = np.concatenate([embed_texts(backend, [text]) for text in TEXTS])
    assert spread(expected[UNLIKE]) < 0.99
    assert_same(together, expected)
    assert_same(alone, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_description_equals_the_torch_backends(family: str, compiled: Callable[..., Compiled]) -> None:
    """What serving reads of a model does not depend on the backend; only the artifact's fidelity is added."""
    made = compiled(family, precision="fp32")
    torch = TorchBackend(spec_of(), snapshot_of(made.directory), trust_remote_code=False).description
    own = made.artifact.description
    differing = {key for key, value in asdict(own).items() if value != asdict(torch)[key]}
    assert differing == {"backend", "fidelity"}
    assert own.fidelity is not None
    assert own.fidelity.min_cosine >= 0.9999
    assert own.fidelity.min_cosine <= own.fidelity.mean_cosine <= 1.0001
    assert own.fidelity.texts > 100


@pytest.mark.parametrize("family", ["bert-prompts-excluded", "qwen3-left"])
def test_prompts_equal_sentence_transformers(family: str, compiled: Callable[..., Compiled]) -> None:
    """Every prompt that a model declares, with its tokens pooled or left out, gives its vectors."""
    made = compiled(family, precision="fp32")
    model, backend = reference(made.directory), made.load()
    for name, prompt in backend.description.prompts.items():
        expected = model.encode(TEXTS, prompt_name=name, show_progress_bar=False)
        assert_same(embed_texts(backend, TEXTS, prompt=prompt), expected)


def test_prompts_of_different_lengths_share_a_batch(compiled: Callable[..., Compiled]) -> None:
    """Each row leaves out its own prompt."""
    backend = compiled("bert-prompts-excluded", precision="fp32").load()
    tokenize = Tokenization(backend.description).encode
    text = "How do I reset my password?"
    prompts = ["passage: retrieve ", "", "query: ", "passage: retrieve "]
    rows = [tokenize([text], prompt=prompt, truncate="END") for prompt in prompts]
    mixed = backend.embed(
        TokenBatch(ids=[row.ids[0] for row in rows], prompt_lengths=[row.prompt_lengths[0] for row in rows])
    )
    single = [backend.embed(TokenBatch(ids=row.ids, prompt_lengths=row.prompt_lengths))[0] for row in rows]
    assert len({row.prompt_lengths[0] for row in rows}) == 3
    assert_same(mixed, np.stack(single))


@pytest.mark.parametrize("precision", ["fp32", "auto", "fp16"])
def test_the_bundled_model_at_each_precision(precision: str, compiled: Callable[..., Compiled]) -> None:
    """fp32 is exact; auto and fp16 compute in bf16 where the processor has it, within 0.9999."""
    made = compiled("bundled", precision=precision)
    texts = [*TEXTS, "word " * 600]
    expected = reference(made.directory).encode(texts, batch_size=4, show_progress_bar=False)
    description = made.artifact.description
    assert cosines(embed_texts(made.load(), texts), expected).min() >= 0.9999
    assert description.precision == ("bf16" if native_bf16() and precision != "fp32" else "fp32")
    assert (description.dimension, description.max_length, description.normalize) == (384, 256, True)
    assert description.fidelity is not None
    assert description.fidelity.min_cosine >= 0.9999
    assert made.artifact.made_by == "torch.export"


def test_fp16_weights_take_half_the_disk(compiled: Callable[..., Compiled]) -> None:
    """precision fp16 is about the size of the weights: computing in fp16 is slower than fp32 on a CPU."""
    whole, half = (compiled("bundled", precision=name).artifact.size for name in ("fp32", "fp16"))
    assert half < 0.6 * whole


def test_phases_are_told_in_order(compiled: Callable[..., Compiled]) -> None:
    """Whoever waits for a compile sees what it is at."""
    phases = compiled("bundled", precision="auto").phases
    assert phases == ["load", "reference vectors", "export", "convert", "save", "verify", "write"]
