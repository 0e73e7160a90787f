"""Odd but legal texts: each has its own vector, alone and among others, and changes nobody else's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.api.models import cosines
from tests.backends.test_tokenization import TOKENIZERS, tokenization_of
from tests.fuzz.contract import Answer, check, vectors
from tests.fuzz.odd_texts import odd_texts
from tests.service import BUNDLED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.service import Service

_MEGABYTE = 1_000_000
_NEIGHBOUR = "How do I reset my password?"


def _embed(service: Service, given: Any) -> NDArray[np.float32]:
    fields = {"input": given, "encoding_format": "base64"}
    # Escapes, since UTF-8 has no lone surrogates.
    answer = Answer.of(service.post(json.dumps(fields).encode()))
    check(answer)
    assert answer.status == 200, answer.body
    return vectors(answer, fields, default_model=BUNDLED)


def test_odd_texts_have_the_same_vector_alone_and_among_others(service: Service) -> None:
    """In one request with all the others, of every length, each text has the vector that it has alone."""
    texts = odd_texts(_MEGABYTE)
    alone = np.concatenate([_embed(service, text) for text in texts.values()])
    neighbour = _embed(service, _NEIGHBOUR)
    together = _embed(service, [part for text in texts.values() for part in (text, _NEIGHBOUR)])
    closeness = dict(zip(texts, cosines(together[::2], alone), strict=True))
    assert min(closeness.values()) > 0.999, closeness
    assert cosines(together[1::2], np.repeat(neighbour, len(texts), axis=0)).min() > 0.999


def test_2048_copies_of_an_odd_text(service: Service) -> None:
    """As many inputs as a request may have, all the same: all have the vector of one alone."""
    text = odd_texts(0)["emoji sequences"][:12]
    alone = _embed(service, text)
    assert cosines(_embed(service, [text] * 2048), np.repeat(alone, 2048, axis=0)).min() > 0.999


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_odd_text_breaks_a_tokenizer(name: str) -> None:
    """With the tokenizers of all families an odd text becomes the same tokens alone and among others."""
    tokenizer = TOKENIZERS[name]()
    tokenization = tokenization_of(tokenizer)
    texts = [*odd_texts(100_000).values(), _NEIGHBOUR]
    together = tokenization.encode(texts, truncate="END")
    assert together.ids == [tokenization.encode([text], truncate="END").ids[0] for text in texts]
    assert together.ids[-1] == tokenizer(_NEIGHBOUR)["input_ids"]
    assert {0 <= token < len(tokenizer) for row in together.ids for token in row} == {True}
