"""Texts are tokenized and truncated as by transformers; unusual texts are not errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emb_model_provider.errors import InputTooLongError, TokenInputError
from tests.backends.helpers import TEXTS, TOKENIZERS, tokenization_of
from tests.backends.small_tokenizers import LENGTH, wordpiece

if TYPE_CHECKING:
    from emb_model_provider.model_spec import Truncate


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("truncate", "side"), [("END", "right"), ("START", "left")])
@pytest.mark.parametrize("limit", [3, 4, 11, LENGTH])
def test_truncation_equals_transformers(name: str, truncate: Truncate, side: str, limit: int) -> None:
    """On either side. Special tokens are kept."""
    tokenizer = TOKENIZERS[name]()
    texts = [text for text in TEXTS if text]
    tokenizer.truncation_side = side
    expected = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    whole = tokenizer(texts)["input_ids"]
    encoded = tokenization_of(tokenizer).encode(texts, truncate=truncate, max_tokens=limit)
    assert encoded.ids == expected
    assert encoded.truncated == sum(len(row) > limit for row in whole)
    assert encoded.prompt_lengths == [0] * len(texts)


def test_max_tokens_lowers_the_maximum_length() -> None:
    """A higher value has no effect."""
    tokenization = tokenization_of(wordpiece(), max_length=10)
    text = ["word " * 50]
    assert len(tokenization.encode(text, truncate="END", max_tokens=5).ids[0]) == 5
    assert len(tokenization.encode(text, truncate="END", max_tokens=500).ids[0]) == 10
    assert len(tokenization.encode(text, truncate="END").ids[0]) == 10


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_limit_below_the_special_tokens_is_kept(name: str, limit: int) -> None:
    """A row has at least one token."""
    encoded = tokenization_of(TOKENIZERS[name]()).encode(["hello world"], truncate="START", max_tokens=limit)
    assert 1 <= len(encoded.ids[0]) <= max(1, limit)


def test_an_input_that_is_too_long_is_an_error_with_truncate_none() -> None:
    """The message names the first one and the limit."""
    tokenization = tokenization_of(wordpiece())
    with pytest.raises(InputTooLongError, match=rf"input\[2\].*maximum input length is {LENGTH} tokens"):
        tokenization.encode(["a", "b", "long " * 100, "long " * 100], truncate="NONE")
    assert tokenization.encode(["a " * (LENGTH - 2)], truncate="NONE").truncated == 0


def test_a_prompt_is_put_before_each_text() -> None:
    """Its length is returned only if pooling excludes it."""
    tokenizer = wordpiece()
    expected = tokenizer(["query: hello", "query: "])["input_ids"]
    included = tokenization_of(tokenizer).encode(["hello", ""], prompt="query: ", truncate="END")
    excluded = tokenization_of(tokenizer, excludes_prompt=True).encode(["hello", ""], prompt="query: ", truncate="END")
    assert included.ids == excluded.ids == expected
    assert included.prompt_lengths == [0, 0]
    # Including the opening special token, but not the closing one.
    assert excluded.prompt_lengths == [len(tokenizer("query: ")["input_ids"]) - 1] * 2


def test_a_prompt_can_be_truncated_at_the_start() -> None:
    """The rest of it is excluded from pooling."""
    tokenization = tokenization_of(wordpiece(), excludes_prompt=True)
    prompt = "query: passage: "
    whole = tokenization.encode(["a"], prompt=prompt, truncate="START")
    length = len(whole.ids[0])
    one_less = tokenization.encode(["a"], prompt=prompt, truncate="START", max_tokens=length - 1)
    none_left = tokenization.encode(["a " * 60], prompt=prompt, truncate="START")
    assert one_less.prompt_lengths == [whole.prompt_lengths[0] - 1]
    assert none_left.prompt_lengths == [1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_empty_text_has_tokens(name: str) -> None:
    """The special tokens or, if the tokenizer adds none, one padding token."""
    tokenizer = TOKENIZERS[name]()
    encoded = tokenization_of(tokenizer).encode(["", "hello"], truncate="END")
    assert encoded.ids[0] == (tokenizer("")["input_ids"] or [tokenizer.pad_token_id])
    assert encoded.truncated == 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_lone_surrogate_is_replaced(name: str) -> None:
    """JSON can contain half a surrogate pair. The other texts of the batch are not affected."""
    tokenization = tokenization_of(TOKENIZERS[name]())
    encoded = tokenization.encode(["fine", "a\ud800b", "\ud83d\ude00"], prompt="\udc00", truncate="END")
    expected = tokenization.encode(["\ufffdfine", "\ufffda\ufffdb", "\ufffd😀"], truncate="END")
    assert encoded.ids == expected.ids


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=[])), max_size=4),
    truncate=st.sampled_from(["END", "START"]),
    max_tokens=st.none() | st.integers(1, 60),
)
def test_any_text_can_be_tokenized(name: str, texts: list[str], truncate: Truncate, max_tokens: int | None) -> None:
    """It has at least one token, at most the allowed number, and only ids of the tokenizer."""
    tokenizer = TOKENIZERS[name]()
    encoded = tokenization_of(tokenizer).encode(texts, truncate=truncate, max_tokens=max_tokens)
    assert len(encoded.ids) == len(encoded.prompt_lengths) == len(texts)
    for row in encoded.ids:
        assert 1 <= len(row) <= min(LENGTH, max_tokens or LENGTH)
        assert all(0 <= token < len(tokenizer) for token in row)


def test_threads_share_a_tokenizer() -> None:
    """Concurrent calls with different limits and sides do not affect each other."""
    tokenization = tokenization_of(wordpiece())
    calls: list[tuple[Truncate, int]] = [("END", 5), ("START", 7), ("END", LENGTH), ("START", LENGTH)] * 40

    def encode(call: tuple[Truncate, int]) -> list[list[int]]:
        return tokenization.encode(TEXTS, truncate=call[0], max_tokens=call[1]).ids

    expected = [encode(call) for call in calls[:4]] * 40
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, calls)) == expected


# --- token ids ------------------------------------------------------------------------------------------


def test_token_ids_are_not_changed() -> None:
    """No special tokens are added, or kept when truncating."""
    tokenization = tokenization_of(wordpiece())
    rows = [[7], [9, 8, 7, 6]]
    assert tokenization.encode_token_ids(rows, truncate="END").ids == rows
    assert tokenization.encode_token_ids(rows, truncate="END", max_tokens=2).ids == [[7], [9, 8]]
    truncated = tokenization.encode_token_ids(rows, truncate="START", max_tokens=2)
    assert (truncated.ids, truncated.truncated, truncated.prompt_lengths) == ([[7], [7, 6]], 1, [0, 0])
    assert rows == [[7], [9, 8, 7, 6]]


def test_too_many_token_ids_are_an_error_with_truncate_none() -> None:
    with pytest.raises(InputTooLongError, match=r"input\[1\]"):
        tokenization_of(wordpiece()).encode_token_ids([[7], [7] * (LENGTH + 1)], truncate="NONE")


@pytest.mark.parametrize(("bad", "value"), [([5, 10_000], "10000"), ([-1], "-1"), ([], "empty")])
def test_invalid_token_ids_are_an_error(bad: list[int], value: str) -> None:
    """The message names the input and the id."""
    with pytest.raises(TokenInputError, match=rf"input\[1\].*{value}") as caught:
        tokenization_of(wordpiece()).encode_token_ids([[5], bad], truncate="END")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "input")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_a_text(name: str) -> None:
    """They have the ids of `encode`, and the characters of tokens that are not special are those of the text."""
    tokenization = tokenization_of(TOKENIZERS[name]())
    for text in ("hello world, 你好", "", "a \ud800 b"):
        tokens = tokenization.tokens(text)
        if tokens:
            assert [[token.id for token in tokens]] == tokenization.encode([text], max_tokens=None).ids
        ordinary = tokenization.tokens(text, add_special_tokens=False)
        assert [token.id for token in tokens if not token.is_special] == [token.id for token in ordinary]
        shown = text.replace("\ud800", "\ufffd")
        assert all(token.text == shown[token.start : token.stop] for token in ordinary if not token.is_special)
