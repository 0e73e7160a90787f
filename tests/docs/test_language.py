"""Names, messages and documents use the terms of docs/glossary.md and plain English."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.docs.markdown import ROOT, rows

if TYPE_CHECKING:
    from pathlib import Path

PHRASES = {
    r"anew": "again, or a verb with re-",
    r"whoever|whosoever": "everyone who, or name the caller",
    r"no more(?! than)": "no longer, or no other",
    r"lent|lends?|lending": "leased",
    r"nobody": "no client, no process, ...",
    r"everybody": "all ...",
    r"could not be had|cannot be had|to be had": "is not available",
    r"(?:is|are|was) no (?:setting|model|error|file|directory|such)": "is not a ..., or unknown ...",
    r"(?:is|are|was|were) told(?: of)?": "is reported",
    r"true enough|truer?(?: to fp32)": "accurate enough",
    r"in good order": "gracefully",
    r"odds and ends": "a heading that names the content",
    r"of late|hitherto|thereof|whence|whilst|thus far|ere|nigh": "a modern word",
    r"keep an eye on": "watch",
    r"(?:made|make|makes|making) way": "evict",
    r"well again": "recovered",
    r"the plainest": "a minimal ...",
    r"mend(?:s|ed|ing)?": "repair or fix",
    r"it stands": "unchanged",
    r"stands? (?:next to|there|in)": "is in",
    r"comes? of (?:it|them|that)": "results",
    r"what (?:it|they|that|one|somebody) (?:is|are) (?:asked|told)": "a noun",
    r"put (?:back )?in(?:to)? (?:its|their) place": "replace",
    r"in the making": "being created",
    r"out of reach": "unreachable",
    r"once more": "again",
    r"as it comes": "with default settings",
}
"""Patterns of phrases to avoid, and what to write instead."""

TERMS = {
    r"lanes?": "stream",
    r"doorkeepers?": "access policy",
    r"residences?": "loaded model",
    r"going[ _]on": "background task",
    r"pulse": "heartbeat",
    r"lifeline": "parent pipe",
    r"strand(?:s|ed)?": "crash",
    r"true?ness": "fidelity",
    r"holds? of snapshots?": "snapshot lock",
    r"shipped exports?": "prebuilt export",
    r"moved[ _]revision": "staged update",
    r"forking|forked off": "child process",
    r"last words": "last lines of stderr",
}
"""Former names, and the terms of the glossary."""

CHECKED = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/*.py", "Dockerfile", ".env.example", ".ci/*", "**/*.py")
    for path in ROOT.glob(pattern)
    if not {".venv", "__pycache__", "node_modules"} & set(path.relative_to(ROOT).parts)
    and path.is_file()
    and path.name != "test_language.py"
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def avoid(patterns: dict[str, str], text: str) -> list[str]:
    """Return a line for each match of a pattern, with its replacement."""
    return [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}, write: {instead}"
        for pattern, instead in patterns.items()
        for match in re.finditer(rf"(?<![\w-])(?:{pattern})(?![\w-])", text, re.IGNORECASE)
    ]


def test_files_are_found() -> None:
    """The tests below check the package, its tests, the benchmarks and the documents."""
    directories = {path.relative_to(ROOT).parts[0] for path in CHECKED}
    assert {"emb_model_provider", "tests", "benchmarks", "docs", "README.md"} <= directories
    assert len(CHECKED) >= 200


@pytest.mark.parametrize("path", CHECKED, ids=relative)
def test_plain_english_and_terms_of_the_glossary(path: Path) -> None:
    """No file contains a phrase or a term that has a plain replacement."""
    assert avoid(PHRASES | TERMS, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text", ["The model is loaded anew.", "Whoever asks", "it hangs no more", "true enough", "the lanes of a model"]
)
def test_private_language_is_detected(text: str) -> None:
    """The patterns match the phrases for which they were written."""
    assert avoid(PHRASES | TERMS, text)


def test_glossary_terms_are_used() -> None:
    """The glossary defines each term once, in alphabetical order, and the package uses it."""
    terms = [row[0].strip("*") for row in rows((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))[1:]]
    assert len(terms) >= 25
    assert terms == sorted(set(terms), key=str.lower)
    package = "\n".join(
        path.read_text(encoding="utf-8") for path in CHECKED if relative(path).startswith("emb_model_provider/")
    ).lower()
    # Names in code are written with underscores or in camel case.
    unused = [term for term in terms if not re.search(re.escape(term).replace(r"\ ", "[ _-]?\n? *"), package)]
    assert unused == []
