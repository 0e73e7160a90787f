"""The texts that fidelity is measured on (probes and corpus), and those that quantization is calibrated on.

No text is in two of the three sets, so that nothing is measured on what it was calibrated on. All texts were written
for this project; they are in `data/`.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

MIN_TOPICS = 4
"""Topics of the smallest part of the corpus. With fewer, ten neighbors would be a large part of all texts."""

_DATA = Path(__file__).with_name("data")
_CORPUS = _DATA / "corpus.json"


@cache
def probes() -> tuple[str, ...]:
    """Return over a hundred deliberately varied texts of 1 to about 300 tokens."""
    groups = _read("probes.json")
    short, sentences, paragraphs = groups["short"], groups["sentences"], groups["paragraphs"]
    return (
        *short,
        *sentences,
        *paragraphs,
        *(" ".join(sentences[start : start + 3]) for start in range(0, 45, 5)),
        *(sentences[i] + " " + paragraphs[i % len(paragraphs)] for i in range(0, 30, 6)),
    )


def long_probes(max_tokens: int) -> tuple[str, ...]:
    """Return three texts: of about a third of a number of tokens, of about that number, and of several times it."""
    groups = _read("probes.json")
    sentences, paragraphs = groups["sentences"], groups["paragraphs"]
    # About three characters per token in Latin script and one in Chinese. The tokenizer truncates what is too long.
    latin, chinese = " ".join((*sentences[:15], paragraphs[0])), paragraphs[2] + sentences[18]
    return (_repeat(latin, max_tokens), _repeat(chinese, max_tokens * 2 // 3), _repeat(latin, max_tokens * 8))


@cache
def topics() -> dict[str, tuple[str, ...]]:
    """Return the corpus by topic: ten texts each, of a few words to a paragraph, in several languages.

    The texts of one topic are expected to be neighbors of each other.
    """
    return _read(_CORPUS.name)


def corpus(share: float = 1.0) -> tuple[str, ...]:
    """Return the corpus, or about a share (0 to 1) of it with at least `MIN_TOPICS` topics.

    Topics are kept whole and are chosen evenly, so that values measured on a part are comparable with those of all.
    """
    every = list(topics().values())
    count = min(len(every), max(MIN_TOPICS, int(share * len(every))))
    return tuple(text for i in range(count) for text in every[i * len(every) // count])


@cache
def corpus_digest() -> str:
    """Return the sha256 of the corpus in hex. It changes with the texts, as do the values measured on them."""
    return hashlib.sha256(_CORPUS.read_bytes()).hexdigest()


@cache
def calibration_texts() -> tuple[str, ...]:
    """Return well over a hundred texts of 1 to about 150 tokens, which int4 weights are calibrated on."""
    groups = _read("calibration.json")
    english, chinese, european = groups["english"], groups["chinese"], groups["european"]
    return (
        *(text for texts in groups.values() for text in texts),
        # Consecutive sentences joined, because the other texts are either shorter or longer.
        *(" ".join(english[start : start + 5]) for start in range(10, 40, 5)),
        *("".join(chinese[start : start + 4]) for start in range(4, 16, 4)),
        *(" ".join(european[start : start + 4]) for start in range(2, 30, 7)),
    )


@cache
def _read(name: str) -> dict[str, tuple[str, ...]]:
    groups = json.loads((_DATA / name).read_text(encoding="utf-8"))
    return {group: tuple(texts) for group, texts in groups.items()}


def _repeat(text: str, characters: int) -> str:
    return (text * (characters // len(text) + 1))[:characters]
