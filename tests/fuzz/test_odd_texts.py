"""Unusual texts have the same vector alone and in a batch, and do not change the vectors of other texts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.api.helpers import cosines
from tests.backends.helpers import TOKENIZERS, tokenization_of
from tests.fuzz.contract import Response, check, vectors
from tests.fuzz.odd_texts import odd_texts
from tests.service import BUNDLED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.service import Service

_NEIGHBOR = "How do I reset my password?"


def _embed(service: Service, value: Any) -> NDArray[np.float32]:
    fields = {"input": value, "encoding_format": "base64"}
    # json.dumps() escapes lone surrogates, which UTF-8 cannot encode.
    response = Response.of(service.post(json.dumps(fields).encode()))
    check(response)
    assert response.status == 200, response.body
    return vectors(response, fields, default_model=BUNDLED)


@pytest.mark.slow
def test_unusual_texts_alone_and_together(service: Service) -> None:
    """In one request with all the others, each text has the vector that it has alone."""
    texts = odd_texts(1_000_000)
    alone = np.concatenate([_embed(service, text) for text in texts.values()])
    neighbor = _embed(service, _NEIGHBOR)
    together = _embed(service, [part for text in texts.values() for part in (text, _NEIGHBOR)])
    closeness = dict(zip(texts, cosines(together[::2], alone), strict=True))
    assert min(closeness.values()) > 0.999, closeness
    assert cosines(together[1::2], np.repeat(neighbor, len(texts), axis=0)).min() > 0.999


def test_2048_equal_texts(service: Service) -> None:
    """With the maximum number of equal inputs, each has the vector of one alone."""
    text = odd_texts(0)["emoji sequences"][:12]
    alone = _embed(service, text)
    assert cosines(_embed(service, [text] * 2048), np.repeat(alone, 2048, axis=0)).min() > 0.999


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_unusual_texts(name: str) -> None:
    """With the tokenizers of all families, an unusual text has the same tokens alone and in a batch."""
    tokenizer = TOKENIZERS[name]()
    tokenization = tokenization_of(tokenizer)
    texts = [*odd_texts(100_000).values(), _NEIGHBOR]
    together = tokenization.encode(texts, truncate="END")
    assert together.ids == [tokenization.encode([text], truncate="END").ids[0] for text in texts]
    assert together.ids[-1] == tokenizer(_NEIGHBOR)["input_ids"]
    assert {0 <= token < len(tokenizer) for row in together.ids for token in row} == {True}
