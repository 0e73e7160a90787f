"""A piece of a long text has the same ids as the whole text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from emb_model_provider.backends.pre_truncation import TextPreTruncator
from emb_model_provider.backends.tokenizer_rules import SPLIT_PATTERNS
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
    "a b", "é 中", "9 a", " 12", "か\u3099 か", "한 글", "\u1112\u1161\u11ab \u1100", "\n", "a\nb", "\r\n", "x\tx", "  ", "<s>", "</s> a", "<|endoftext|>",
    "<mask>", "'s", "! a", "a !", "\u2581", "a\u2581b", "…", "\u00a0", "\u200d", "ﬁ a", "Ⅷ 8",
]  # fmt: skip
"""Texts in which a piece could end: combining marks, words of about the maximum length of WordPiece, special tokens, and
white space beside letters, digits, marks and punctuation."""


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    """Return tokenizers whose texts are truncated, with the rules of the families that the names say."""
    made: dict[str, Tokenizer] = {
        name: function().backend_tokenizer
        for name, function in {
            "wordpiece": wordpiece, "mpnet": lambda: wordpiece("mpnet"), "unigram": unigram, "byte-bpe": byte_bpe,
        }.items()
    }  # fmt: skip
    for number, pattern in enumerate(sorted(SPLIT_PATTERNS)):
        made[f"split-{number}"] = changed(
            made["byte-bpe"],
            normalizer={"type": "NFC"},
            pre_tokenizer={"type": "Sequence", "pretokenizers": [split(pattern), {**BYTE_LEVEL, "use_regex": False}]},
        )
    made["xlm-r"] = changed(
        made["unigram"],
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Nmt"}, {"type": "NFKC"}, replacement({"Regex": " {2,}"}, " ")],
        },
    )
    made["mask"] = changed(
        made["unigram"],
        added_tokens=[
            *json.loads(made["unigram"].to_str())["added_tokens"],
            {**TOKEN, "id": 9, "content": "<mask>", "lstrip": True},
        ],
    )
    return made


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def changed(tokenizer: Tokenizer, **parts: object) -> Tokenizer:
    return Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), **parts}))


def longest_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the texts of long tokens, which a piece could divide."""
    tokens = sorted(tokenizer.get_vocab(), key=lambda token: (-len(token), token))
    return [token.replace("▁", " ").replace("Ġ", " ") for token in tokens[:50]]


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replacement(pattern: dict[str, str], content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def added(contents: Sequence[str]) -> list[dict[str, object]]:
    return [{**TOKEN, "id": number, "content": content, "normalized": False} for number, content in enumerate(contents)]


def truncator_of(tokenizer: Tokenizer, **changes: object) -> TextPreTruncator | None:
    """Return the truncator of a tokenizer with some parts of its file changed."""
    contents = {**json.loads(tokenizer.to_str()), **changes}
    return TextPreTruncator.for_tokenizer(contents, Tokenizer.from_str(json.dumps(contents)))


@pytest.mark.parametrize(
    ("name", "from_end"),
    [
        *((name, from_end) for name in ("wordpiece", "mpnet") for from_end in (False, True)),
        *((name, False) for name in ("unigram", "xlm-r", "mask", "byte-bpe", "split-0", "split-1")),
    ],
)
def test_kept_ids_are_those_of_the_whole_text(
    tokenizers: dict[str, Tokenizer], pytestconfig: pytest.Config, name: str, from_end: bool
) -> None:
    """Wherever a piece ends."""
    tokenizer = tokenizers[name]
    usual = truncator_of(tokenizer)
    assert usual is not None
    assert usual.from_end or not from_end
    # The shortest possible pieces, so that nearly every text is truncated, and most of them several times.
    truncator = replace(usual, characters_per_token=1, growth=2)

    def ids(inputs: Sequence[str]) -> list[list[int]]:
        valid = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in inputs]
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(valid)]

    @settings_for(pytestconfig, 0.15)
    @given(
        st.lists(st.sampled_from(_UNITS) | st.sampled_from(longest_tokens(tokenizer)) | texts, min_size=1, max_size=30),
        st.integers(1, 30),
        st.integers(2, 20),
    )
    def check(parts: list[str], repeated: int, keep: int) -> None:
        text = "".join(parts) * repeated
        (piece,), (whole,) = truncator.encode([text], ids, keep=keep, from_end=from_end), ids([text])
        assert piece == whole or len(piece) > keep
        # Without the special tokens at both ends, which the truncation of ids puts back.
        assert (piece[-keep:-1] == whole[-keep:-1]) if from_end else (piece[: keep - 1] == whole[: keep - 1])

    check()


@pytest.mark.parametrize("name", ["unigram", "xlm-r", "mask", "byte-bpe", "split-0", "split-1"])
def test_all_ids_of_a_piece_that_ends_at_white_space_are_those_of_the_whole_text(
    tokenizers: dict[str, Tokenizer], pytestconfig: pytest.Config, name: str
) -> None:
    """However long the piece is."""
    tokenizer = tokenizers[name]
    truncator = truncator_of(tokenizer)
    assert truncator is not None
    assert truncator.separators

    def ids(text: str) -> list[int]:
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return tokenizer.encode(valid, add_special_tokens=False).ids  # type: ignore[no-any-return]  # without types

    @settings_for(pytestconfig, 0.3)
    @given(st.lists(st.sampled_from(_UNITS) | st.sampled_from(longest_tokens(tokenizer)), min_size=1, max_size=20))
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        whole = ids(text)
        for piece in {truncator.piece(text, characters, from_end=False) for characters in range(len(text))}:
            assert ids(piece) == whole[: len(ids(piece))]

    check()


@pytest.mark.parametrize(
    ("tokenizer", "truncate", "kinds"),
    [
        (wordpiece, "END", {"words", "#", "CJK"}),
        (wordpiece, "START", {"words", "#", "CJK"}),
        (unigram, "END", {"words"}),
        (byte_bpe, "END", {"words"}),
    ],
)
def test_only_a_piece_of_a_long_text_is_tokenized(
    tokenizer: Callable[[], Any], truncate: Truncate, kinds: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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

    tokenization = tokenization_of(tokenizer())
    long = [text for name, text in odd_texts(1_000_000).items() if name in kinds]
    expected = [tokenization.encode([text[:-500_000]], truncate=truncate).ids[0] for text in long]
    monkeypatch.setattr(TextPreTruncator, "encode", count_characters)
    encoded = tokenization.encode(long, truncate=truncate)
    assert len(long) == len(kinds)
    assert encoded.truncated == len(long)
    assert 0 < characters < 20_000
    assert encoded.ids == expected


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("unigram", {"pre_tokenizer": None}),
        (
            "unigram",
            {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}},
        ),
        ("unigram", {"pre_tokenizer": {"type": "UnicodeScripts"}}),
        ("unigram", {"normalizer": replacement({"String": " "}, "▁")}),
        ("unigram", {"normalizer": replacement({"Regex": r"a\s+b"}, "c")}),
        ("byte-bpe", {"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}),
        ("byte-bpe", {"pre_tokenizer": {"type": "Digits", "individual_digits": True}}),
        ("byte-bpe", {"pre_tokenizer": split(r"\w+ \w+")}),
        ("byte-bpe", {"pre_tokenizer": {**split(min(SPLIT_PATTERNS)), "behavior": "MergedWithNext"}}),
        ("byte-bpe", {"pre_tokenizer": {**split(min(SPLIT_PATTERNS)), "invert": True}}),
        ("byte-bpe", {"added_tokens": [{**TOKEN, "id": 9, "content": "two words"}]}),
        ("byte-bpe", {"added_tokens": [{**TOKEN, "id": 9, "content": "word", "rstrip": True}]}),
        ("byte-bpe", {"added_tokens": [{**TOKEN, "id": 9, "content": "word", "lstrip": True}]}),
    ],
)
def test_tokenizers_whose_parts_may_depend_on_each_other_read_whole_texts(
    tokenizers: dict[str, Tokenizer], name: str, changes: dict[str, object]
) -> None:
    """One character could change tokens far away."""
    assert truncator_of(tokenizers[name], **changes) is None


def test_a_text_without_white_space_is_read_as_a_whole(tokenizers: dict[str, Tokenizer]) -> None:
    """Also if all of its white space is beside marks."""
    truncator = truncator_of(tokenizers["unigram"])
    assert truncator is not None
    for text in ("中" * 5000, "# " * 5000, "a\nb" * 2000):
        read: list[str] = []

        def ids(pieces: list[str], read: list[str] = read) -> list[list[int]]:
            read += pieces
            return [encoding.ids for encoding in tokenizers["unigram"].encode_batch_fast(pieces)]

        (row,) = truncator.encode([text], ids, keep=10, from_end=False)
        assert read[-1] == text
        assert row == tokenizers["unigram"].encode(text).ids


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
    truncator = truncator_of(wordpiece().backend_tokenizer, added_tokens=added(contents))
    assert truncator is not None
    assert truncator.from_end == from_end


_RUNS = ["x" * 2000, "Ж" * 1500, "é1" * 1000, " " * 3000, "\u3000\t\n" * 700, "a" * 1100]
"""Texts whose middle does not change the ids."""


@pytest.mark.parametrize("from_end", [False, True])
def test_shortened_runs_have_the_ids_of_the_whole_text(
    tokenizers: dict[str, Tokenizer], pytestconfig: pytest.Config, from_end: bool
) -> None:
    """Whatever is next to them."""
    tokenizer = tokenizers["wordpiece"]
    usual = truncator_of(tokenizer)
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
    truncator = truncator_of(wordpiece().backend_tokenizer, added_tokens=added(contents))
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
