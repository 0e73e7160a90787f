"""Models whose vectors depend on padding are run with inputs of the same length in a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import FNetConfig, FNetModel, MobileBertConfig, MobileBertModel

from emb_model_provider.backends.pytorch.padding import NOTE
from tests.backends.helpers import TEXTS, assert_same, cosines, embed_texts, load_torch, reference
from tests.backends.small_tokenizers import wordpiece
from tests.models import save_st

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "max_position_embeddings": 64}


def mobilebert(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Embeds each token with its neighbors."""
    config = MobileBertConfig(
        vocab_size=len(tokenizer), embedding_size=24, intra_bottleneck_size=24, num_attention_heads=4,
        initializer_range=0.3, **SIZES,
    )  # fmt: skip
    model = MobileBertModel(config)
    # PyTorch initializes the row of the padding to zero, which in a trained model it is not.
    torch.nn.init.normal_(model.embeddings.word_embeddings.weight, std=0.3)
    return model


def fnet(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Mixes all tokens of a row, those of the padding included."""
    return FNetModel(FNetConfig(vocab_size=len(tokenizer), initializer_range=0.3, **SIZES))


@pytest.mark.parametrize("build", [mobilebert, fnet])
def test_a_text_has_the_vector_that_it_has_alone(
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel], tmp_path: Path
) -> None:
    """In sentence-transformers it depends on the other texts of the batch. A note says so."""
    directory = save_st(tmp_path / "model", build, wordpiece())
    model = reference(directory)
    alone = np.concatenate([model.encode([text], show_progress_bar=False) for text in TEXTS])
    assert cosines(model.encode(TEXTS, show_progress_bar=False), alone).min() < 0.999
    backend = load_torch(directory)
    assert_same(embed_texts(backend, TEXTS), alone)
    assert NOTE in backend.description.notes


def test_inputs_of_other_models_are_padded(family_directory: Callable[[str], Path]) -> None:
    assert NOTE not in load_torch(family_directory("bert-cls")).description.notes
