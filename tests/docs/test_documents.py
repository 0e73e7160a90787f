"""The documents agree with each other and with the code."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

import pytest

from tests.docs.markdown import DOCUMENTS, ROOT, Block, anchors, blocks, links, rows, sections

if TYPE_CHECKING:
    from pathlib import Path

CHINESE = [
    document
    for document in DOCUMENTS
    if document.name.endswith(".zh-CN.md") or document.with_suffix(".en.md") in DOCUMENTS
]
PACKAGE = ROOT / "emb_model_provider"
MARKS = {"", "run", "output", "env", "script", "startup", "mapping keys", "hybrid", "ray", "spark"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def english(document: Path) -> Path:
    """Return the English form of a Chinese document: without `.zh-CN`, or with `.en` if users know the Chinese name."""
    if document.name.endswith(".zh-CN.md"):
        return document.with_name(document.name.replace(".zh-CN", ""))
    return document.with_suffix(".en.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def python_files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*.py") if "__pycache__" not in path.parts]


def test_the_parser_finds_documents_links_and_blocks() -> None:
    """The tests below check something."""
    assert len(DOCUMENTS) >= 15
    assert len(CHINESE) >= 5
    assert sum(len(links(document)) for document in DOCUMENTS) >= 80
    assert sum(len(blocks(document)) for document in DOCUMENTS) >= 80


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_between_documents_are_valid(document: Path) -> None:
    """Every linked file exists and contains the linked heading."""
    for link in links(document):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("document", CHINESE, ids=relative)
def test_both_languages_show_the_same_code(document: Path) -> None:
    """Code blocks are equal and in the same order, except for comments."""

    def code(block: Block) -> tuple[str, str, str]:
        lines = [line for line in block.text.splitlines() if not line.lstrip().startswith("#")]
        return block.mark, block.language, "\n".join(lines)

    assert [code(block) for block in blocks(document)] == [code(block) for block in blocks(english(document))]


@pytest.mark.parametrize("document", CHINESE, ids=relative)
def test_both_languages_have_the_same_sections(document: Path) -> None:
    """Sections have the same level, number of table rows, settings, options and routes."""

    def outline(section: str) -> tuple[int, int, set[str]]:
        level = len(section) - len(section.lstrip("#"))
        return level, len(rows(section)), set(re.findall(r"EMB_PROVIDER_[A-Z_]+|--[a-z-]{2,}|`/[\w/]+`", section))

    assert [outline(section) for section in sections(document)] == [
        outline(section) for section in sections(english(document))
    ]


def test_the_two_commands_are_at_the_top() -> None:
    """The first two commands of both READMEs start the service and run the tests; CI runs the same tests."""
    for name in ("README.md", "README.zh-CN.md"):
        first, second = blocks(ROOT / name)[:2]
        assert first.text == "pip install uv && uv run python -m emb_model_provider.main\n"
        assert second.text == "pip install uv && uv run pytest\n"
    script = read(".ci/run")
    assert "pip install uv\n" in script
    assert "\nstep uv run pytest --" in script
    assert "\nstep uv run pytest -m slow --" in script


def test_contributing_shows_every_package_and_module() -> None:
    """The picture of the architecture contains all packages and top-level modules, and no others."""
    (picture,) = (block.text for block in blocks(ROOT / "CONTRIBUTING.md") if block.language == "text")
    package, _, _ = picture.partition("\ntests/ ")
    shown = set(re.findall(r"^  (\w+/)", package, re.MULTILINE)) | set(
        re.findall(r"\b\w+\.py(?=  |$)", package, re.MULTILINE)
    )
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert shown == packages | modules


def test_marks_are_known() -> None:
    """A misspelled mark would exclude an example from the tests."""
    assert {block.mark for document in DOCUMENTS for block in blocks(document)} <= MARKS


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_files_in_documents_exist(document: Path) -> None:
    """Every `directory/module.py` in a document is a file of the repository or of the package."""
    for path in re.findall(r"`([\w/]+/\w+\.py)(?:::[^`]*)?`", document.read_text(encoding="utf-8")):
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), path


@pytest.mark.parametrize("name", ["docs/reliability.md", "docs/security.md"])
def test_tests_in_documents_exist(name: str) -> None:
    """Every `test_…` in a document is a test function or a test module."""
    existing = set()
    for path in python_files(ROOT / "tests"):
        existing.add(path.stem)
        existing |= {
            node.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
    named = set(re.findall(r"\btest_\w+", read(name)))
    assert len(named) >= 8
    assert named <= existing


@pytest.mark.parametrize("name", ["docs/troubleshooting.md", "docs/troubleshooting.zh-CN.md"])
def test_messages_in_troubleshooting_exist(name: str) -> None:
    """The code contains every message that troubleshooting quotes, apart from the values in it."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in python_files(PACKAGE))
    texts = re.sub(r'"\n\s+f?"', "", source)
    headings = re.findall(r"^\*\*(.+?)\*\*", read(name), re.MULTILINE)
    values = r"…|:|'\w+'|ModelScope|Hugging Face|int8|torchao|SIGKILL|the service|/data/"
    parts = [
        part.strip(" .?")
        for quoted in re.findall(r"`([^`]+)`", "\n".join(headings))
        for part in re.split(values, quoted)
        if part.strip().count(" ") >= 2 and not part.startswith(("pip install", "Fatal Python", " command not found"))
    ]
    assert len(parts) >= 15
    assert [part for part in parts if part not in texts] == []
