"""The texts among which neighbours are counted: a few hundred, in many languages, by topic.

They are the project's own and lie beside this file. Each topic holds ten texts of a few words to a paragraph, in
English, Chinese and others, so that a text has neighbours that it should have. They are neither the probes
(`probes.py`), which are chosen to be odd, nor texts that anything is calibrated on.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("corpus.json")
LEAST_TOPICS = 4
"""However slow a model is: with fewer, ten neighbours would be a large part of all texts."""


@cache
def topics() -> dict[str, tuple[str, ...]]:
    """Return all texts, by topic, in the order of the file."""
    return {name: tuple(texts) for name, texts in json.loads(_FILE.read_text(encoding="utf-8")).items()}


def corpus(share: float = 1.0) -> tuple[str, ...]:
    """Return all texts, or about a share of them (0 to 1): whole topics, evenly chosen, at least `LEAST_TOPICS`.

    Topics stay whole so that a text keeps the neighbours that it should have, and a figure over fewer texts means
    the same.
    """
    every = list(topics().values())
    count = min(len(every), max(LEAST_TOPICS, int(share * len(every))))
    return tuple(text for i in range(count) for text in every[i * len(every) // count])


@cache
def corpus_digest() -> str:
    """Return a sha256 over the texts, in hex: other texts, other figures."""
    return hashlib.sha256(_FILE.read_bytes()).hexdigest()
