"""Rules of a tokenizer.json that take too much memory or time are refused, and panics of the library are errors."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from emb_model_provider.backends.pre_truncation import MAX_CHARACTERS
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.backends.tokenizer_rules import is_known, require_bounded
from emb_model_provider.errors import InferenceError, LoadError, TextTooLongError
from tests.backends.helpers import TOKENIZERS, description
from tests.backends.small_tokenizers import byte_bpe, unigram


def rules(**parts: Any) -> dict[str, Any]:
    """Return the contents of a small tokenizer.json with other parts."""
    contents: dict[str, Any] = json.loads(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)).to_str())
    return contents | parts


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(parts)}


def charsmap(*texts: str) -> str:
    return b64encode((4).to_bytes(4, "little") + bytes(4) + "\0".join(texts).encode()).decode()


def tokenization(contents: dict[str, Any]) -> Tokenization:
    return Tokenization(description(tokenizer_json=json.dumps(contents), vocab_size=2))


@pytest.mark.parametrize(
    "normalizer",
    [
        replace("x" * 10**6, String="a"),
        sequence(*[replace("aaaaaaaaaa", String="a")] * 8),
        sequence(*[replace("b", Regex="(?=.)")] * 8),
        sequence(*[replace("b", Regex="b*")] * 8),
        sequence(sequence(replace("y" * 9, Regex="[a-z]")), replace("y" * 9, Regex="[a-z]")),
        {"type": "Precompiled", "precompiled_charsmap": charsmap("a", "x" * 100)},
        {"type": "Prepend", "prepend": "x" * 10**6},
    ],
)
def test_normalizers_that_lengthen_texts_without_bound_are_refused(normalizer: dict[str, Any]) -> None:
    """The library would end the process."""
    with pytest.raises(LoadError, match=r"\(tokenizer\.json\)\. Choose another model"):
        require_bounded(rules(normalizer=normalizer))


@pytest.mark.parametrize(
    "normalizer",
    [
        sequence(
            replace('"', String="``"), replace(" ", Regex=" {2,}"), {"type": "Precompiled", "precompiled_charsmap": ""}
        ),
        sequence({"type": "Prepend", "prepend": "▁"}, replace("▁", String=" ")),
        {"type": "Precompiled", "precompiled_charsmap": charsmap("صلى الله عليه وسلم", "1⁄4")},
        sequence(*[replace("", Regex="x*")] * 50),
        None,
    ],
)
def test_usual_normalizers_are_accepted(normalizer: dict[str, Any] | None) -> None:
    require_bounded(rules(normalizer=normalizer))


def test_words_and_affixes_of_wordpiece_are_bounded() -> None:
    """Both are quadratic in time or memory."""
    for part in ({"max_input_chars_per_word": 10**6}, {"continuing_subword_prefix": "#" * 10**4}):
        with pytest.raises(LoadError, match=r"tokenizer\.json"):
            require_bounded(rules(model={"type": "WordPiece", **part}))


def test_a_template_of_many_special_tokens_is_refused() -> None:
    """Each text would have as many tokens."""
    token = {"SpecialToken": {"id": "a", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [*[token] * 5000, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"a": {"id": "a", "ids": [1], "tokens": ["a"]}},
    }
    with pytest.raises(LoadError, match="adds 5000 tokens to each text"):
        tokenization(rules(post_processor=template))


def test_a_panic_while_loading_is_a_load_error() -> None:
    with pytest.raises(LoadError, match=r"the tokenizer failed: .*precompiled_charsmap"):
        tokenization(rules(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}))


def test_a_panic_while_tokenizing_is_an_error_of_the_input() -> None:
    """Such as that of a regular expression that takes exponential time, which the library gives up."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    evil = tokenization(rules(pre_tokenizer=split))
    assert not evil.is_known
    text = "a" * 40 + "b"
    for call in (lambda: evil.encode([text]), lambda: evil.tokens(text), lambda: evil.encode(["a"], prompt=text)):
        with pytest.raises(InferenceError, match=r"the tokenizer failed: .*retry-limit"):
            call()
    assert evil.encode(["a"]).ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_usual_tokenizers_are_known(name: str) -> None:
    """Short texts are tokenized on the event loop."""
    assert is_known(json.loads(TOKENIZERS[name]().backend_tokenizer.to_str()))


@pytest.mark.parametrize("make", [unigram, byte_bpe])
def test_texts_that_are_too_long_are_refused(make: Any) -> None:
    """By tokenizers that read whole texts. The message names the input and the limit."""
    contents = json.loads(make().backend_tokenizer.to_str())
    tokenizer = Tokenization(description(tokenizer_json=json.dumps(contents), vocab_size=10_000))
    for truncate in ("END", "START"):
        with pytest.raises(
            TextTooLongError, match=rf"input\[1\].*{MAX_CHARACTERS + 1} characters.*up to {MAX_CHARACTERS}"
        ):
            tokenizer.encode(["a", "a" * (MAX_CHARACTERS + 1)], truncate=truncate)
