"""A parser for the documents: fenced code blocks with their marks, links, headings and table rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[a-z ]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    document: str
    line: int
    mark: str
    """The comment on the line before the block: `run`, `output` (of the previous block), `env`, `startup`, `hybrid`, `ray`, `spark`, or empty."""
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [
        Block(
            document=document.relative_to(ROOT).as_posix(),
            line=text.count("\n", 0, match.start()) + 1,
            mark=match["mark"] or "",
            language=match["language"],
            text=match["text"],
        )
        for match in _BLOCK.finditer(text)
    ]


def prose(document: Path) -> str:
    """Return a document without its code blocks."""
    return _BLOCK.sub("", document.read_text(encoding="utf-8"))


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings of a document, as GitHub generates them."""
    names = set()
    for heading in _HEADING.findall(prose(document)):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        names.add(kept.replace(" ", "-"))
    return names


def sections(document: Path) -> list[str]:
    """Return the sections of a document with their headings, without code blocks."""
    return re.split(r"^(?=#+ )", prose(document), flags=re.MULTILINE)


def links(document: Path) -> list[str]:
    return _LINK.findall(prose(document))


def rows(text: str) -> list[list[str]]:
    """Return the cells of the table rows in a Markdown text."""
    cells_of_rows = []
    for line in text.splitlines():
        if line.startswith("| "):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            cells_of_rows.append([cell.strip().replace("\\|", "|") for cell in cells])
    return cells_of_rows
