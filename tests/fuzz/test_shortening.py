"""Reading a piece of a long text gives the very ids that reading all of it gives."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from emb_model_provider.backends import tokenization as shortening
from emb_model_provider.backends.tokenization import TextPreTruncator
from tests.backends.small_tokenizers import byte_bpe, unigram, wordpiece
from tests.backends.test_tokenization import tokenization_of
from tests.fuzz.bodies import texts
from tests.fuzz.fuzzing import settings_for
from tests.fuzz.odd_texts import odd_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

_UNITS = [
    "a", " ", "#", "中", "e\u0301", "\u0301", "\u0323", "\u0e38", "\u302e", "각", "\ud83d\ude00", "\ud83d", "\0", "[SEP]", "[SE", "P]", "[CLS]", "[", "]",
    "hello", "hello ", "x" * 99, "x" * 100, "x" * 101, "don't", "\u00ad", "İ", "ﷺ", "\u3000",
]  # fmt: skip
"""What a cut could fall into: marks that are put in order, words about as long as WordPiece reads, special tokens."""


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {"wordpiece": wordpiece(), "mpnet": wordpiece("mpnet")}


@pytest.mark.parametrize("name", ["wordpiece", "mpnet"])
@pytest.mark.parametrize("from_end", [False, True])
def test_kept_ids_are_those_of_the_whole_text(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, name: str, from_end: bool
) -> None:  # fmt: skip
    """Wherever the cut falls, the ids that are kept are those of the whole text."""
    tokenizer = tokenizers[name].backend_tokenizer
    # Pieces as short as they can be, so that nearly every text is cut, most of them several times.
    monkeypatch.setattr(shortening, "_CHARACTERS_PER_TOKEN", 1)
    monkeypatch.setattr(shortening, "_GROWTH", 2)
    shorten = TextPreTruncator.of(json.loads(tokenizer.to_str()))
    assert shorten is not None
    assert shorten.from_end

    def ids(given_texts: Sequence[str]) -> list[list[int]]:
        sane = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in given_texts]
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(sane)]

    @settings_for(pytestconfig, 0.15)
    @given(
        st.lists(st.sampled_from(_UNITS) | texts, min_size=1, max_size=30),
        st.integers(1, 30),
        st.integers(2, 20),
    )
    def same(parts: list[str], repeated: int, keep: int) -> None:
        text = "".join(parts) * repeated
        (piece,), (whole,) = shorten.encode([text], ids, keep=keep, from_end=from_end), ids([text])
        assert piece == whole or len(piece) > keep
        # The special tokens at both ends are put back by who cuts.
        assert (piece[-keep:-1] == whole[-keep:-1]) if from_end else (piece[: keep - 1] == whole[: keep - 1])

    same()


@pytest.mark.parametrize("truncate", ["END", "START"])
def test_little_of_a_long_text_is_read(truncate: Any) -> None:
    """Of 1 MB that is tokens throughout, a few thousand characters reach the tokenizer."""
    tokenization = tokenization_of(wordpiece())
    read = 0
    whole = tokenization._ids

    def counting(given_texts: list[str]) -> list[list[int]]:
        nonlocal read
        read += sum(map(len, given_texts))
        return whole(given_texts)

    tokenization._ids = counting  # type: ignore[method-assign,assignment]
    long = [text for name, text in odd_texts(1_000_000).items() if name in {"words", "#", "CJK"}]
    encoded = tokenization.encode(long, truncate=truncate)
    assert encoded.truncated == len(long)
    assert read < 20_000
    assert encoded.ids == [tokenization.encode([text[:-500_000]], truncate=truncate).ids[0] for text in long]


@pytest.mark.parametrize("tokenizer", [unigram, byte_bpe])
def test_other_tokenizers_read_whole_texts(tokenizer: Any) -> None:
    """Where one character can change tokens far away, nothing is cut beforehand."""
    assert TextPreTruncator.of(json.loads(tokenizer().backend_tokenizer.to_str())) is None


@pytest.mark.parametrize(
    ("contents", "from_end"),
    [
        (["[CLS]", "[SEP]"], True),
        (["<s>", "</s>", "<mask>"], True),
        (["aa"], False),
        (["<a>", "><"], False),
        ([], True),
    ],
)
def test_special_tokens_that_overlap_are_read_from_the_start(contents: list[str], from_end: bool) -> None:
    """From the middle of a text one could be found where the whole text has another."""
    tokenizer = json.loads(Tokenizer.from_str(wordpiece().backend_tokenizer.to_str()).to_str())
    tokenizer["added_tokens"] = [{"content": content, "normalized": False} for content in contents]
    found = TextPreTruncator.of(tokenizer)
    assert found is not None
    assert found.from_end == from_end
