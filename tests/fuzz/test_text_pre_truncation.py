"""A piece of a long text has the same ids as the whole text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from emb_model_provider.backends.tokenization import TextPreTruncator
from emb_model_provider.errors import TextTooLongError
from tests.backends.helpers import tokenization_of
from tests.backends.small_tokenizers import byte_bpe, unigram, wordpiece
from tests.fuzz.bodies import texts
from tests.fuzz.fuzzing import settings_for
from tests.fuzz.odd_texts import odd_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from emb_model_provider.model_spec import Truncate

_UNITS = [
    "a", " ", "#", "中", "e\u0301", "\u0301", "\u0323", "\u0e38", "\u302e", "각", "\ud83d\ude00", "\ud83d", "\0", "[SEP]", "[SE", "P]", "[CLS]", "[", "]",
    "hello", "hello ", "x" * 99, "x" * 100, "x" * 101, "don't", "\u00ad", "İ", "ﷺ", "\u3000",
]  # fmt: skip
"""Texts in which a piece could end: combining marks, words of about the maximum length of WordPiece, special tokens."""


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {"wordpiece": wordpiece(), "mpnet": wordpiece("mpnet")}


@pytest.mark.parametrize("name", ["wordpiece", "mpnet"])
@pytest.mark.parametrize("from_end", [False, True])
def test_kept_ids_are_those_of_the_whole_text(
    tokenizers: dict[str, Any], pytestconfig: pytest.Config, name: str, from_end: bool
) -> None:
    """Wherever a piece ends."""
    tokenizer = tokenizers[name].backend_tokenizer
    usual = TextPreTruncator.for_tokenizer(json.loads(tokenizer.to_str()))
    assert usual is not None
    assert usual.from_end
    # The shortest possible pieces, so that nearly every text is truncated, and most of them several times.
    truncator = replace(usual, characters_per_token=1, growth=2)

    def ids(inputs: Sequence[str]) -> list[list[int]]:
        valid = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in inputs]
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(valid)]

    @settings_for(pytestconfig, 0.15)
    @given(st.lists(st.sampled_from(_UNITS) | texts, min_size=1, max_size=30), st.integers(1, 30), st.integers(2, 20))
    def check(parts: list[str], repeated: int, keep: int) -> None:
        text = "".join(parts) * repeated
        (piece,), (whole,) = truncator.encode([text], ids, keep=keep, from_end=from_end), ids([text])
        assert piece == whole or len(piece) > keep
        # Without the special tokens at both ends, which the truncation of ids puts back.
        assert (piece[-keep:-1] == whole[-keep:-1]) if from_end else (piece[: keep - 1] == whole[: keep - 1])

    check()


@pytest.mark.parametrize("truncate", ["END", "START"])
def test_only_a_piece_of_a_long_text_is_tokenized(truncate: Truncate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts of 1 MB, the tokenizer gets a few thousand characters."""
    characters = 0
    real = TextPreTruncator.encode

    def count_characters(
        truncator: TextPreTruncator,
        texts: Sequence[str],
        encode: Callable[[list[str]], list[list[int]]],
        *,
        keep: int,
        from_end: bool,
    ) -> list[list[int]]:
        def count_and_encode(pieces: list[str]) -> list[list[int]]:
            nonlocal characters
            characters += sum(map(len, pieces))
            return encode(pieces)

        return real(truncator, texts, count_and_encode, keep=keep, from_end=from_end)

    tokenization = tokenization_of(wordpiece())
    long = [text for name, text in odd_texts(1_000_000).items() if name in {"words", "#", "CJK"}]
    expected = [tokenization.encode([text[:-500_000]], truncate=truncate).ids[0] for text in long]
    monkeypatch.setattr(TextPreTruncator, "encode", count_characters)
    encoded = tokenization.encode(long, truncate=truncate)
    assert len(long) == 3
    assert encoded.truncated == len(long)
    assert 0 < characters < 20_000
    assert encoded.ids == expected


@pytest.mark.parametrize("tokenizer", [unigram, byte_bpe])
def test_other_tokenizers_read_whole_texts(tokenizer: Any) -> None:
    """One character can change tokens far away."""
    assert TextPreTruncator.for_tokenizer(json.loads(tokenizer().backend_tokenizer.to_str())) is None


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
def test_pieces_from_the_end_require_special_tokens_that_do_not_overlap(contents: list[str], from_end: bool) -> None:
    """Otherwise a piece could contain another special token than the whole text."""
    tokenizer = json.loads(Tokenizer.from_str(wordpiece().backend_tokenizer.to_str()).to_str())
    tokenizer["added_tokens"] = [{"content": content, "normalized": False} for content in contents]
    truncator = TextPreTruncator.for_tokenizer(tokenizer)
    assert truncator is not None
    assert truncator.from_end == from_end


_RUNS = ["x" * 2000, "Ж" * 1500, "é1" * 1000, " " * 3000, "\u3000\t\n" * 700, "a" * 1100]
"""Texts whose middle does not change the ids."""


@pytest.mark.parametrize("from_end", [False, True])
def test_shortened_runs_have_the_ids_of_the_whole_text(
    tokenizers: dict[str, Any], pytestconfig: pytest.Config, from_end: bool
) -> None:
    """Whatever is next to them."""
    tokenizer = tokenizers["wordpiece"].backend_tokenizer
    usual = TextPreTruncator.for_tokenizer(json.loads(tokenizer.to_str()))
    assert usual is not None
    assert usual.shortens_runs
    truncator = replace(usual, characters_per_token=1, growth=2)

    def ids(inputs: Sequence[str]) -> list[list[int]]:
        valid = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in inputs]
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(valid)]

    @settings_for(pytestconfig, 0.1)
    @given(st.lists(st.sampled_from(_UNITS) | st.sampled_from(_RUNS), min_size=1, max_size=12), st.integers(2, 20))
    def check(parts: list[str], keep: int) -> None:
        text = "".join(parts)
        (piece,), (whole,) = truncator.encode([text], ids, keep=keep, from_end=from_end), ids([text])
        assert piece == whole or len(piece) > keep
        assert (piece[-keep:-1] == whole[-keep:-1]) if from_end else (piece[: keep - 1] == whole[: keep - 1])

    check()


@pytest.mark.parametrize("contents", [["[PAD]", "word"], ["   "], ["<" + "x" * 600 + ">"]])
def test_runs_are_not_shortened_if_special_tokens_could_be_in_them(contents: list[str]) -> None:
    tokenizer = json.loads(wordpiece().backend_tokenizer.to_str())
    tokenizer["added_tokens"] = [{"content": content, "normalized": False} for content in contents]
    truncator = TextPreTruncator.for_tokenizer(tokenizer)
    assert truncator is not None
    assert not truncator.shortens_runs


def test_a_word_of_31_million_letters_is_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """WordPiece has one token for it, and takes 0.4 KiB of memory for each character that it reads."""
    characters = 0
    tokenization = tokenization_of(wordpiece())
    expected = tokenization.encode(["x" * 5000 + " end"]).ids
    real = TextPreTruncator.encode

    def count_characters(
        truncator: TextPreTruncator,
        texts: Sequence[str],
        encode: Callable[[list[str]], list[list[int]]],
        *,
        keep: int,
        from_end: bool,
    ) -> list[list[int]]:
        def count_and_encode(pieces: list[str]) -> list[list[int]]:
            nonlocal characters
            characters += sum(map(len, pieces))
            return encode(pieces)

        return real(truncator, texts, count_and_encode, keep=keep, from_end=from_end)

    monkeypatch.setattr(TextPreTruncator, "encode", count_characters)
    assert tokenization.encode(["x" * 31_000_000 + " end"]).ids == expected
    assert characters < 100_000
    with pytest.raises(TextTooLongError):
        tokenization.encode(["\U0001f600" * 3_000_000])
