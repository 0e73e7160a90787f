"""The documents agree with each other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.docs.markdown import DOCUMENTS, ROOT, Block, anchors, blocks, links, rows, sections

if TYPE_CHECKING:
    from pathlib import Path

CHINESE = [document for document in DOCUMENTS if document.name.endswith(".zh-CN.md")]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_link_between_documents_leads_somewhere(document: Path) -> None:
    """A linked file exists, and has the heading that is linked."""
    for link in links(document):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("document", CHINESE, ids=named)
def test_both_languages_show_the_same_commands(document: Path) -> None:
    """Commands, programs, settings and output are the same, in the same order; only their comments may differ."""
    english = document.with_name(document.name.replace(".zh-CN", ""))
    assert [code(block) for block in blocks(document)] == [code(block) for block in blocks(english)]


@pytest.mark.parametrize("document", CHINESE, ids=named)
def test_both_languages_have_the_same_sections(document: Path) -> None:
    """Each as deep as the other's, with as many rows of tables, and the same settings, options and routes named."""
    english = document.with_name(document.name.replace(".zh-CN", ""))
    assert [outline(section) for section in sections(document)] == [outline(s) for s in sections(english)]


def outline(section: str) -> tuple[int, int, set[str]]:
    level = len(section) - len(section.lstrip("#"))
    return level, len(rows(section)), set(re.findall(r"EMB_PROVIDER_[A-Z_]+|--[a-z-]{2,}|`/[\w/]+`", section))


def code(block: Block) -> tuple[str, str, str]:
    lines = [line for line in block.text.splitlines() if not line.lstrip().startswith("#")]
    return block.mark, block.language, "\n".join(lines)


def test_the_two_commands_stand_at_the_top() -> None:
    """Serving and testing are the first two commands of both READMEs, and CI runs the tests the same way."""
    for name in ("README.md", "README.zh-CN.md"):
        first, second = blocks(ROOT / name)[:2]
        assert first.text == "pip install uv && uv run python -m emb_model_provider.main\n"
        assert second.text == "pip install uv && uv run pytest\n"
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install uv\n" in script
    assert "uv run pytest\n" in script


def test_the_house_has_the_rooms_that_contributing_names() -> None:
    """Every module and directory of the package has its line there, and no other is named."""
    (house,) = (block.text for block in blocks(ROOT / "CONTRIBUTING.md") if block.language == "text")
    package, _, _ = house.partition("tests/ ")
    named_there = set(re.findall(r"\b\w+(?:\.py|/)(?= |$|:)", package, re.MULTILINE)) - {
        "emb_model_provider/"
    }
    directory = ROOT / "emb_model_provider"
    rooms = {f"{path.name}/" for path in directory.iterdir() if list(path.glob("*.py"))}
    rooms |= {path.name for path in directory.glob("*.py") if path.name != "__init__.py"}
    assert rooms <= named_there
    assert all(list(directory.rglob(name.rstrip("/"))) for name in named_there), named_there


def test_every_mark_is_known() -> None:
    """A misspelt mark would take an example out of the tests without a word."""
    known = {"", "run", "output", "env", "script", "mapping keys"}
    assert {block.mark for document in DOCUMENTS for block in blocks(document)} <= known
