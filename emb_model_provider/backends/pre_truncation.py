"""Truncates long texts before they are tokenized, where that does not change the tokens that are kept.

A tokenizer takes up to a microsecond and 0.4 KiB of memory for each character, and all of its tokens but some hundred
are dropped again. Two kinds of tokenizers need only a piece of a text:

- BERT's read a text word by word, and a word has a maximum length. A piece can end anywhere if the tokens next to its end
  are dropped.
- Those that divide texts at white space before they do anything else (byte-level BPE, SentencePiece with `Metaspace`) read
  each part independently of the others. A piece ends with a letter before white space that a letter follows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emb_model_provider.backends.tokenizer_rules import SPLIT_PATTERNS, WHITE_SPACE_PATTERNS, flatten
from emb_model_provider.errors import TextTooLongError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tokenizers import Tokenizer

MAX_CHARACTERS = 1 << 20
"""Longest text that is tokenized. Tokenizers need up to 0.4 KiB of memory and a microsecond for each character."""

_MAX_DECOMPOSITION = 4
"""Characters that NFD makes of one character at most."""
_KEPT_OF_RUN = 512
"""Characters of a long run that are kept at each end of it."""
_RUN_CHARACTERS = "A-Za-z0-9À-ÖØ-öø-ÿĀ-ſА-яЁё"
"""Letters and digits that BERT's normalizer neither removes nor isolates, with any options and any version of Unicode."""
_RUN = re.compile(f"[{_RUN_CHARACTERS}]{{{2 * _KEPT_OF_RUN},}}|[ \\t\\r\\n\u00a0\u3000]{{{2 * _KEPT_OF_RUN},}}")
_SHORTENED_AT_ONCE = 1 << 20
"""Characters in which runs are searched at once, because a search blocks all other threads."""
_WORD_CHARACTERS = f"{_RUN_CHARACTERS}\u4e00-\u9fff\u3041-\u3096\u30a1-\u30fa\uac00-\ud7a3"
"""Letters and digits that begin a character of their own and that all splitters take for letters or digits: those, and
those of Chinese, Japanese and Korean."""
_SEPARATORS = " \n\t\u3000"
"""White space at which a piece may end if a tokenizer divides texts there."""
_SEARCHED_AT_ONCE = 4096
"""Characters in which the end of a piece is searched at once."""
_NEUTRAL_NORMALIZERS = frozenset(
    {
        "BertNormalizer",
        "Lowercase",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Precompiled",
        "Prepend",
        "Sequence",
        "Strip",
        "StripAccents",
    }
)
"""Normalizers for which a letter does not depend on what follows the white space after it."""
_NEUTRAL_PRE_TOKENIZERS = frozenset(
    {"BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Sequence", "Whitespace", "WhitespaceSplit"}
)
"""Pre-tokenizers that look at no more than one part of a text between white space."""


@dataclass(frozen=True, slots=True)
class TextPreTruncator:
    """Tokenizes only as much of a long text as is needed."""

    margin: int
    """Number of tokens next to the end of a piece that can differ from those of the whole text."""
    from_end: bool
    """Whether pieces can also be taken from the end of a text."""
    shortens_runs: bool = False
    """Whether the middle of a long run of letters, or of spaces, does not change the ids. WordPiece has one id for each
    word that is too long."""
    characters_per_token: int = 16
    """Characters per token of the first piece. Most texts have 1 to 6, so that one piece is enough."""
    growth: int = 8
    """Factor by which a piece grows if it was too short."""
    separators: str = ""
    """White space at which pieces must end; empty if they can end anywhere."""

    @classmethod
    def for_tokenizer(cls, contents: Mapping[str, Any], tokenizer: Tokenizer) -> TextPreTruncator | None:
        """Return the truncator of a tokenizer, which has these `contents` of a `tokenizer.json`, or None if it must read whole texts."""
        kinds = [(contents.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
        added = contents.get("added_tokens") or []
        # Special tokens that are searched for after normalization would have to be measured after it, too.
        if kinds != ["BertNormalizer", "BertPreTokenizer", "WordPiece"] or any(
            token.get("normalized") for token in added
        ):
            separators = _separators(contents, tokenizer)
            return cls(margin=0, from_end=False, separators=separators) if separators else None
        names = [token["content"] for token in added]
        longest = max(map(len, names), default=0)
        # Two more characters: the neighbor of a special token, which decides whether it is one, and half a surrogate
        # pair.
        at_end = _MAX_DECOMPOSITION * (longest + 2)
        longest_word = contents["model"].get("max_input_chars_per_word", 100)
        return cls(
            margin=longest_word + at_end,
            from_end=not _overlap(names),
            # Special tokens could be in a run only if they consist of its characters.
            shortens_runs=max(longest, longest_word) < _KEPT_OF_RUN
            and not any(re.fullmatch(rf"[{_RUN_CHARACTERS}]*|\s*", name) for name in names),
        )

    def encode(
        self, texts: Sequence[str], encode: Callable[[list[str]], list[list[int]]], *, keep: int, from_end: bool
    ) -> list[list[int]]:
        """Return the ids of each text, or of a piece of it whose first (or last) `keep` ids are those of the whole text.

        `encode` returns the ids of texts. `keep` includes special tokens. The row of a piece has more than `keep` ids.

        Raises:
            TextTooLongError: More than `MAX_CHARACTERS` of a text would have to be read.
        """
        texts = list(texts)
        enough = keep + self.margin
        characters = self.characters_per_token * enough
        rows: list[list[int]] = [[]] * len(texts)
        pending = list(range(len(texts)))
        first = True
        while pending:
            if not first and self.shortens_runs:
                for i in pending:
                    texts[i] = _shorten_runs(texts[i])
            first = False
            pieces = [self.piece(texts[i], characters, from_end=from_end) for i in pending]
            require_short(pieces, pending)
            too_short = []
            for i, piece, ids in zip(pending, pieces, encode(pieces), strict=True):
                if len(piece) == len(texts[i]) or len(ids) > enough:
                    rows[i] = ids
                else:
                    too_short.append(i)
            pending, characters = too_short, characters * self.growth
        return rows

    def piece(self, text: str, characters: int, *, from_end: bool) -> str:
        """Return at most so many characters of a text, and fewer (perhaps none) if a piece must end at white space."""
        if from_end:
            return text[-characters:]
        if not self.separators or characters >= len(text):
            return text[:characters]
        end = re.compile(f"[{_WORD_CHARACTERS}](?=[{self.separators}][{_WORD_CHARACTERS}])")
        stop = characters
        while stop > 0:
            start = max(0, stop - _SEARCHED_AT_ONCE)
            # Two more characters: a match needs those behind it.
            ends = [match.end() for match in end.finditer(text, start, min(stop + 2, len(text)))]
            if ends:
                return text[: ends[-1]]
            stop = start
        return ""


def require_short(texts: Sequence[str], indexes: Sequence[int] | None = None) -> None:
    """Raise TextTooLongError if a text is too long to be tokenized; `indexes` are the positions of the texts."""
    for position, text in enumerate(texts):
        if len(text) > MAX_CHARACTERS:
            index = position if indexes is None else indexes[position]
            raise TextTooLongError(index, len(text), MAX_CHARACTERS)


def _shorten_runs(text: str) -> str:
    """Return a text without the middle of runs of letters and digits, or of spaces, that are longer than any word."""
    parts = (text[start : start + _SHORTENED_AT_ONCE] for start in range(0, len(text), _SHORTENED_AT_ONCE))
    return "".join(_RUN.sub(lambda match: match[0][:_KEPT_OF_RUN] + match[0][-_KEPT_OF_RUN:], part) for part in parts)


def _overlap(contents: Sequence[str]) -> bool:
    """Return whether an end of one text is the beginning of another one, or of itself."""
    beginnings = {content[:length] for content in contents for length in range(1, len(content))}
    return any(content[start:] in beginnings for content in contents for start in range(1, len(content)))


def _separators(contents: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Return white space at which a tokenizer divides texts, so that the part before it does not depend on the part after it.

    Empty if that is not known.
    """
    if not (
        all(map(_is_neutral_normalizer, flatten(contents.get("normalizer"))))
        and all(map(_is_neutral_pre_tokenizer, flatten(contents.get("pre_tokenizer"))))
        and (contents.get("model") or {}).get("type") in ("BPE", "Unigram", "WordLevel", "WordPiece")
        and not (contents.get("model") or {}).get("dropout")
        and all(map(_is_within_a_part, contents.get("added_tokens") or []))
        and tokenizer.pre_tokenizer is not None
    ):
        return ""

    def parts(text: str) -> list[str]:
        normalized = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
        return [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]

    # The other letters are treated like these, because all rules are known.
    return "".join(
        each
        for each in _SEPARATORS
        if all(parts(f"{a}{each}b")[:-1] and parts(f"{a}{each}b")[0] == parts(a)[0] for a in "aZ9中")
    )


def _is_neutral_normalizer(rule: Mapping[str, Any]) -> bool:
    if rule.get("type") != "Replace":
        return rule.get("type") in _NEUTRAL_NORMALIZERS
    match rule.get("pattern"):
        case {"String": str(text)}:
            return bool(text) and not re.search(r"\s", text)
        case {"Regex": str(regex)}:
            return regex in WHITE_SPACE_PATTERNS
    return False


def _is_neutral_pre_tokenizer(rule: Mapping[str, Any]) -> bool:
    if rule.get("type") != "Split":
        return rule.get("type") in _NEUTRAL_PRE_TOKENIZERS
    pattern = rule.get("pattern") or {}
    return pattern.get("Regex") in SPLIT_PATTERNS and rule.get("behavior") == "Isolated" and not rule.get("invert")


def _is_within_a_part(token: Mapping[str, Any]) -> bool:
    """Return whether an added token has no white space, and takes none from beside a letter."""
    name = token["content"]
    takes_space = any(token.get(option) for option in ("lstrip", "rstrip", "single_word"))
    return not re.search(r"[\s\u2581]", name) and not (takes_space and re.search(r"\w", name[:1] + name[-1:]))
