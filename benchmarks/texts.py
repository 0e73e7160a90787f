"""Texts of known lengths, all different within a run.

Words are drawn with Zipf weights from the whole words of the model's vocabulary, so that a text of n words has exactly
n + 2 tokens ([CLS] and [SEP]), and the lengths follow a stated distribution instead of that of a corpus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from emb_model_provider.hubs.local import find_bundled

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kind = Literal["short", "doc", "passage"]

_DISTRIBUTIONS: dict[Kind, str] = {
    "short": "tokens uniform over 8 to 18, mean 13",
    "doc": "tokens lognormal (mu 4.32, sigma 0.7), clipped to 8 to 256, mean 92",
    "passage": "116 tokens, 128 with a short query and the special tokens of a pair",
}
SPECIAL_TOKENS = 2
_LONGEST = 256
_SHORTEST = 8
_PASSAGE = 116
_NOUNS: dict[Kind, str] = {"short": "short text", "doc": "document", "passage": "passage"}


def count_texts(kind: Kind, count: int) -> str:
    """Return a number of texts for a table, such as `1 short text` or `32 documents`."""
    return f"{count} {_NOUNS[kind]}{'s' if count > 1 else ''}"


def describe_texts(*kinds: Kind) -> list[str]:
    """Return a note on the lengths of each kind of texts."""
    return [f"{kind}: {_DISTRIBUTIONS[kind]}" for kind in dict.fromkeys(kinds)]


def draw_lengths(kind: Kind, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return lengths in tokens, including special tokens; int64 of shape (count,)."""
    if kind == "short":
        return random.integers(_SHORTEST, 18, size=count, endpoint=True)
    if kind == "passage":
        return np.full(count, _PASSAGE, dtype=np.int64)
    lengths = np.rint(random.lognormal(4.32, 0.7, size=count)).astype(np.int64)
    return np.clip(lengths, _SHORTEST, _LONGEST)


def count_tokens(text: str) -> int:
    """Return the number of tokens of a text from a `Corpus`, including special tokens."""
    return text.count(" ") + 1 + SPECIAL_TOKENS


class Corpus:
    """A source of texts that never returns the same text twice. The same seed produces the same texts."""

    def __init__(self, seed: int = 7) -> None:
        vocabulary = (find_bundled() / "vocab.txt").read_text(encoding="utf-8").splitlines()
        words = [word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 1]
        self._words = np.array(words, dtype=object)
        self._cumulative = np.cumsum(1.0 / np.arange(1, len(words) + 1))
        self._random = np.random.default_rng(seed)
        self._seen: set[str] = set()

    def texts(self, kind: Kind, count: int) -> list[str]:
        """Return `count` new texts."""
        texts: list[str] = []
        while len(texts) < count:
            lengths = draw_lengths(kind, count - len(texts), self._random)
            for length in (lengths - SPECIAL_TOKENS).tolist():
                positions = self._random.random(length) * self._cumulative[-1]
                text = " ".join(self._words[np.searchsorted(self._cumulative, positions)])
                if text not in self._seen:
                    self._seen.add(text)
                    texts.append(text)
        return texts
