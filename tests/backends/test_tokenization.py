"""Texts and token ids become what transformers would make of them, and nothing odd breaks the service."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emb_model_provider.backends.base import ModelDescription
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import InputTooLongError, TokenInputError
from tests.backends.comparison import TEXTS
from tests.backends.small_tokenizers import LENGTH, byte_bpe, unigram, wordpiece

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

    from emb_model_provider.model_spec import Truncate

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "wordpiece": wordpiece,
    "unigram": unigram,
    "byte-bpe": byte_bpe,
    "closing token only": lambda: byte_bpe(around=("", "<|endoftext|>")),
    "no special tokens": lambda: byte_bpe(around=("", "")),
}


def tokenization_of(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Tokenization:
    values: dict[str, Any] = {
        "dimension": 8,
        "max_length": LENGTH,
        "vocab_size": len(tokenizer),
        "tokenizer_json": tokenizer.backend_tokenizer.to_str(),
        "pad_token_id": tokenizer.pad_token_id,
        "padding_side": "right",
        "normalize": True,
        "pooling": "mean",
        "prompts": {},
        "default_prompt": None,
        "excludes_prompt": False,
        "matryoshka": None,
        "precision": "fp32",
        "device": "cpu",
        "backend": "torch",
    }
    return Tokenization(ModelDescription(**{**values, **changes}))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("truncate", "side"), [("END", "right"), ("START", "left")])
@pytest.mark.parametrize("limit", [3, 4, 11, LENGTH])
def test_cutting_equals_transformers(name: str, truncate: Truncate, side: str, limit: int) -> None:
    """Ids are those that transformers gives with truncation on either side, special tokens kept."""
    tokenizer = TOKENIZERS[name]()
    texts = [text for text in TEXTS if text]
    tokenizer.truncation_side = side
    expected = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    whole = tokenizer(texts)["input_ids"]
    encoded = tokenization_of(tokenizer).encode(texts, truncate=truncate, max_tokens=limit)
    assert encoded.ids == expected
    assert encoded.truncated == sum(len(row) > limit for row in whole)
    assert encoded.prompt_lengths == [0] * len(texts)


def test_a_limit_of_a_request_lowers_the_models_own() -> None:
    """max_tokens counts only where it is less than the model's maximum."""
    tokenization = tokenization_of(wordpiece(), max_length=10)
    text = ["word " * 50]
    assert len(tokenization.encode(text, truncate="END", max_tokens=5).ids[0]) == 5
    assert len(tokenization.encode(text, truncate="END", max_tokens=500).ids[0]) == 10
    assert len(tokenization.encode(text, truncate="END").ids[0]) == 10


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_limit_without_room_for_text_still_gives_tokens(name: str, limit: int) -> None:
    """The fewest tokens are one, and a row never exceeds its limit."""
    encoded = tokenization_of(TOKENIZERS[name]()).encode(["hello world"], truncate="START", max_tokens=limit)
    assert 1 <= len(encoded.ids[0]) <= max(1, limit)


def test_the_first_input_that_is_too_long_is_named() -> None:
    """With truncate NONE an input over the limit is an error that says which, and what the limit is."""
    tokenization = tokenization_of(wordpiece())
    with pytest.raises(InputTooLongError, match=rf"input\[2\].*maximum input length is {LENGTH} tokens"):
        tokenization.encode(["a", "b", "long " * 100, "long " * 100], truncate="NONE")
    assert tokenization.encode(["a " * (LENGTH - 2)], truncate="NONE").truncated == 0


def test_a_prompt_stands_before_each_text() -> None:
    """The prompt is part of the text; its length is told only where pooling leaves it out."""
    tokenizer = wordpiece()
    expected = tokenizer(["query: hello", "query: "])["input_ids"]
    included = tokenization_of(tokenizer).encode(["hello", ""], prompt="query: ", truncate="END")
    excluded = tokenization_of(tokenizer, excludes_prompt=True).encode(
        ["hello", ""], prompt="query: ", truncate="END"
    )
    assert included.ids == excluded.ids == expected
    assert included.prompt_lengths == [0, 0]
    # The opening special token counts, the closing one does not.
    assert excluded.prompt_lengths == [len(tokenizer("query: ")["input_ids"]) - 1] * 2


def test_a_prompt_that_was_cut_at_the_start_is_shorter() -> None:
    """truncate START takes the prompt's tokens first: what is left of it is still left out of pooling."""
    tokenization = tokenization_of(wordpiece(), excludes_prompt=True)
    prompt = "query: passage: "
    whole = tokenization.encode(["a"], prompt=prompt, truncate="START")
    length = len(whole.ids[0])
    one_less = tokenization.encode(["a"], prompt=prompt, truncate="START", max_tokens=length - 1)
    none_left = tokenization.encode(["a " * 60], prompt=prompt, truncate="START")
    assert one_less.prompt_lengths == [whole.prompt_lengths[0] - 1]
    assert none_left.prompt_lengths == [1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_empty_text_gives_tokens(name: str) -> None:
    """Special tokens alone, or one padding token where the tokenizer adds none: never an empty row."""
    tokenizer = TOKENIZERS[name]()
    encoded = tokenization_of(tokenizer).encode(["", "hello"], truncate="END")
    assert encoded.ids[0] == (tokenizer("")["input_ids"] or [tokenizer.pad_token_id])
    assert encoded.truncated == 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_lone_surrogate_is_read_as_the_replacement_character(name: str) -> None:
    """JSON can carry half a surrogate pair; it is not an error, and its neighbours are not touched."""
    tokenization = tokenization_of(TOKENIZERS[name]())
    odd = tokenization.encode(["fine", "a\ud800b", "\ud83d\ude00"], prompt="\udc00", truncate="END")
    sane = tokenization.encode(["\ufffdfine", "\ufffda\ufffdb", "\ufffd😀"], truncate="END")
    assert odd.ids == sane.ids


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=[])), max_size=4),
    truncate=st.sampled_from(["END", "START"]),
    max_tokens=st.none() | st.integers(1, 60),
)
def test_no_text_breaks_it(name: str, texts: list[str], truncate: Truncate, max_tokens: int | None) -> None:
    """Any string Python can hold becomes between one and the allowed number of known ids."""
    tokenizer = TOKENIZERS[name]()
    encoded = tokenization_of(tokenizer).encode(texts, truncate=truncate, max_tokens=max_tokens)
    assert len(encoded.ids) == len(encoded.prompt_lengths) == len(texts)
    for row in encoded.ids:
        assert 1 <= len(row) <= min(LENGTH, max_tokens or LENGTH)
        assert all(0 <= token < len(tokenizer) for token in row)


def test_threads_share_a_tokenizer() -> None:
    """Calls with different limits and sides, at the same time, do not disturb each other."""
    tokenization = tokenization_of(wordpiece())
    calls: list[tuple[Truncate, int]] = [("END", 5), ("START", 7), ("END", LENGTH), ("START", LENGTH)] * 40

    def encode(call: tuple[Truncate, int]) -> list[list[int]]:
        return tokenization.encode(TEXTS, truncate=call[0], max_tokens=call[1]).ids

    expected = [encode(call) for call in calls[:4]] * 40
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, calls)) == expected


# --- token ids ------------------------------------------------------------------------------------------


def test_token_ids_are_taken_as_they_are() -> None:
    """No special tokens are added, and cutting keeps none."""
    tokenization = tokenization_of(wordpiece())
    rows = [[7], [9, 8, 7, 6]]
    assert tokenization.encode_token_ids(rows, truncate="END").ids == rows
    assert tokenization.encode_token_ids(rows, truncate="END", max_tokens=2).ids == [[7], [9, 8]]
    cut = tokenization.encode_token_ids(rows, truncate="START", max_tokens=2)
    assert (cut.ids, cut.truncated, cut.prompt_lengths) == ([[7], [7, 6]], 1, [0, 0])
    assert rows == [[7], [9, 8, 7, 6]]


def test_token_ids_over_the_limit_are_an_error_where_they_may_not_be_cut() -> None:
    """The same error as for a text."""
    with pytest.raises(InputTooLongError, match=r"input\[1\]"):
        tokenization_of(wordpiece()).encode_token_ids([[7], [7] * (LENGTH + 1)], truncate="NONE")


@pytest.mark.parametrize(("bad", "says"), [([5, 10_000], "10000"), ([-1], "-1"), ([], "empty")])
def test_token_ids_the_model_does_not_have_are_an_error(bad: list[int], says: str) -> None:
    """The message names the input, the id and the range."""
    with pytest.raises(TokenInputError, match=rf"input\[1\].*{says}") as caught:
        tokenization_of(wordpiece()).encode_token_ids([[5], bad], truncate="END")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "input")
