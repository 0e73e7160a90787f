"""What the rules of a `tokenizer.json` can do to a text: how much they lengthen it, and whether their time is known."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from typing import TYPE_CHECKING, Any

from emb_model_provider.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MAX_GROWTH = 64
"""Largest factor by which the rules may lengthen a text. NFKC, as a table of sentencepiece, has 18."""
_MAX_ADDED_CHARACTERS = 1_000
"""Longest text that a rule may put before each text or word."""
_MAX_WORD_CHARACTERS = 1_000
"""Longest word that WordPiece may divide, for which it tries all pairs of positions."""
_ADVICE = "Choose another model, or correct the file."
_KNOWN_TYPES = frozenset(
    {
        "BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Replace", "Sequence",
        "Strip", "StripAccents",
        "BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "Whitespace", "WhitespaceSplit",
        "BPE", "Unigram", "WordLevel", "WordPiece",
    }
)  # fmt: skip
"""Normalizers, pre-tokenizers and models whose time is nearly proportional to the length of the text."""
WHITE_SPACE_PATTERNS = frozenset({r"\s+", " {2,}"})
"""Regular expressions of CLIP and XLM-R that match white space only."""
SPLIT_PATTERNS = frozenset(
    {
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
"""Regular expressions with which Qwen and Llama divide texts. Each match of a letter or digit ends before white space."""
_KNOWN_PATTERNS = WHITE_SPACE_PATTERNS | SPLIT_PATTERNS
"""Regular expressions that take no exponential time, unlike others."""


def is_known(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether the time of all rules of a `tokenizer.json` is known to be short for short texts."""
    for part in ("normalizer", "pre_tokenizer", "model"):
        for rule in flatten(tokenizer.get(part)):
            pattern = rule.get("pattern")
            regex = pattern.get("Regex") if isinstance(pattern, dict) else None
            if rule.get("type") not in _KNOWN_TYPES or (regex is not None and regex not in _KNOWN_PATTERNS):
                return False
    return True


def without_padding(tokenizer_json: str, **changes: object) -> str:
    """Return a `tokenizer.json` without truncation and padding, which depend on the request and on the batch."""
    contents = {**json.loads(tokenizer_json), "truncation": None, "padding": None, **changes}
    return json.dumps(contents, ensure_ascii=False)


def require_bounded(tokenizer: Mapping[str, Any]) -> None:
    """Raise LoadError if the rules of a `tokenizer.json` can take much more memory or time than the text is long.

    The library ends the process if memory cannot be allocated.
    """
    growth = 1
    for rule in flatten(tokenizer.get("normalizer")):
        growth *= _growth(rule)
        if growth > _MAX_GROWTH:
            raise LoadError(
                f"its normalizer can make a text more than {_MAX_GROWTH} times as long (tokenizer.json). {_ADVICE}"
            )
    model = tokenizer.get("model") or {}
    added = [rule.get("prepend") for rule in flatten(tokenizer.get("normalizer"))]
    added += [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
    if any(isinstance(text, str) and len(text) > _MAX_ADDED_CHARACTERS for text in added):
        raise LoadError(
            f"it adds more than {_MAX_ADDED_CHARACTERS} characters to each text (tokenizer.json). {_ADVICE}"
        )
    longest = model.get("max_input_chars_per_word")
    if isinstance(longest, int) and longest > _MAX_WORD_CHARACTERS:
        raise LoadError(
            f"it divides words of more than {_MAX_WORD_CHARACTERS} characters: max_input_chars_per_word is {longest} "
            f"(tokenizer.json). {_ADVICE}"
        )


def flatten(rule: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a rule, or the rules of a sequence."""
    if not isinstance(rule, dict):
        return
    yield rule
    for name in ("normalizers", "pretokenizers"):
        parts = rule.get(name)
        for part in parts if isinstance(parts, list) else ():
            yield from flatten(part)


def _growth(rule: Mapping[str, Any]) -> int:
    """Return the largest factor by which a rule of a normalizer lengthens a text."""
    match rule:
        case {"type": "Replace", "content": str(content), "pattern": {"String": str(text)}}:
            return max(1, -(-len(content) // max(1, len(text))))
        case {"type": "Replace", "content": str(content), "pattern": {"Regex": str(regex)}}:
            # A match can be empty, so that the text remains beside the inserted content.
            return max(1, len(content)) if _consumes(regex) else 1 + len(content)
        case {"type": "Precompiled", "precompiled_charsmap": str(encoded)}:
            return _longest_replacement(b64decode(encoded))
    return 1


def _consumes(regex: str) -> bool:
    """Return whether each match of a regular expression is known to have a character."""
    if "(?" in regex or set(regex) & set("^$|") or re.search(r"\\[bBAzZG]", regex):
        return False
    try:
        return re.compile(regex).fullmatch("") is None
    except re.error:
        return False


def _longest_replacement(charsmap: bytes) -> int:
    """Return the length of the longest text in a table of sentencepiece: the size of a trie, the trie, and the texts."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max((len(text.decode("utf-8", "replace")) for text in texts.split(b"\0")), default=1) or 1
