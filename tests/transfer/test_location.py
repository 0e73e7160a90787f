"""Sources, destinations and list files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import InvalidTransferError
from emb_model_provider.transfer.batch import read_pairs
from emb_model_provider.transfer.location import Location, parse_destination, parse_source

if TYPE_CHECKING:
    from pathlib import Path

HF = Location("huggingface", "a/b")
MS = Location("modelscope", "a/b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", HF),
        ("hf:a/b", HF),
        ("huggingface:a/b@v1.0", Location("huggingface", "a/b", "v1.0")),
        ("ms:a/b", MS),
        ("modelscope:a/b@master", Location("modelscope", "a/b", "master")),
        ("a/b@refs/pr/1", Location("huggingface", "a/b", "refs/pr/1")),
        ("https://huggingface.co/a/b/tree/v1", Location("huggingface", "a/b", "v1")),
        ("https://modelscope.cn/models/a/b/summary", MS),
    ],
)
def test_sources(text: str, expected: Location) -> None:
    assert parse_source(text) == expected


@pytest.mark.parametrize(
    ("text", "source", "expected"),
    [
        ("c/d", HF, Location("modelscope", "c/d")),
        ("c/d", MS, Location("huggingface", "c/d")),
        ("a/b", HF, MS),
        ("hf:c/d", HF, Location("huggingface", "c/d")),
        ("ms:c/d", MS, Location("modelscope", "c/d")),
        ("dir:/data/x", HF, Location("directory", "/data/x")),
        ("https://modelscope.cn/models/c/d", HF, Location("modelscope", "c/d")),
    ],
)
def test_destinations(text: str, source: Location, expected: Location) -> None:
    """Without a prefix a destination is on the other hub."""
    assert parse_destination(text, source) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "/a/b",
        "a/b/c",
        "../b",
        "a/..",
        "a/b@",
        "a/b@../x",
        "a b/c",
        "xx:a/b",
        "dir:/x",
        "https://h/a/b",
        "-a/b",
    ],
)
def test_invalid_sources(text: str) -> None:
    with pytest.raises(InvalidTransferError):
        parse_source(text)


@pytest.mark.parametrize("text", ["hf:a/b", "c/d@v1", "dir:", "c", "ms:../d"])
def test_invalid_destinations(text: str) -> None:
    with pytest.raises(InvalidTransferError):
        parse_destination(text, HF)


def test_a_list_has_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeff# 注释\r\n\r\na/b c/d\r\n  ms:e/f\thf:g/h  # why\r\n#x/y z/w\r\n".encode())
    pairs = read_pairs(path)
    assert [(str(pair.source), str(pair.destination)) for pair in pairs] == [
        ("huggingface:a/b", "modelscope:c/d"),
        ("modelscope:e/f", "huggingface:g/h"),
    ]


def test_an_invalid_list_names_all_lines(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("a/b c/d\na/b\na/b c/d e/f\n../x c/d\ne/f c/d\n")
    with pytest.raises(InvalidTransferError) as raised:
        read_pairs(path)
    message = str(raised.value)
    for line in ("line 2: ", "line 3: ", "line 4: ", "line 5: modelscope:c/d is the destination of line 1"):
        assert line in message


@pytest.mark.parametrize("content", [b"", b"# only a comment\n", b"\xff\xfe"])
def test_a_list_without_pairs_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(InvalidTransferError):
        read_pairs(path)
    with pytest.raises(InvalidTransferError, match="cannot be read"):
        read_pairs(tmp_path / "none.txt")
