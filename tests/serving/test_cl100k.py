"""Token ids of OpenAI are decoded as tiktoken does, from a file of the package."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import BodyTooLargeError, LoadError
from emb_model_provider.serving import cl100k
from tests.service import NO_NETWORK

if TYPE_CHECKING:
    from pathlib import Path

    from tiktoken import Encoding

TEXTS = ["hello world", "你好，世界 😀", "<|endoftext|>", " \n\t" * 100, "naïve café", "\0", ""]


def decode(row: list[int]) -> str:
    return cl100k.decode(row, max_bytes=10_000)


def test_vocabulary_is_that_of_tiktoken(tiktoken_cl100k: Encoding) -> None:
    """All tokens, special ones included, and no others."""
    vocabulary = cl100k.load_vocabulary()
    assert len(vocabulary) == tiktoken_cl100k.n_vocab == cl100k.MAX_ID + 1
    unused = [number for number, token in enumerate(vocabulary) if not token]
    assert unused == [100_256, *range(100_261, 100_276)]
    for number in set(range(len(vocabulary))).difference(unused):
        assert vocabulary[number] == tiktoken_cl100k.decode_single_token_bytes(number)


@pytest.mark.parametrize("text", TEXTS)
def test_texts(tiktoken_cl100k: Encoding, text: str) -> None:
    """Any text is the same after it was encoded and decoded."""
    assert decode(tiktoken_cl100k.encode(text, allowed_special="all")) == text


def test_parts_of_a_text(tiktoken_cl100k: Encoding) -> None:
    """Wherever a client splits a text, each part has its characters, without those that are split."""
    text = "a😀𠮷的龘b" * 3
    ids = tiktoken_cl100k.encode(text)
    for cut in range(1, len(ids)):
        first, last = decode(ids[:cut]), decode(ids[cut:])
        assert text.startswith(first)
        assert text.endswith(last)
        assert len(text) - len(first + last) in (0, 1)
    assert {decode([number]) for number in tiktoken_cl100k.encode("龘")} == {""}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([15339, cl100k.MAX_ID + 1], r"100277 is out of the range 0 to 100276"),
        ([-1], r"-1 is out of the range"),
        ([2**63], r"9223372036854775808 is out of the range"),
        ([15339, 100_256], r"100256 is not used"),
        ([15339, 222, 15339], r"not valid UTF-8"),
        ([15339, 222, 222, 222, 222], r"not valid UTF-8"),
        ([222, 222, 222, 222], r"not valid UTF-8"),
    ],
)
def test_other_ids(row: list[int], message: str) -> None:
    """Ids that cl100k_base does not have, and ids of other tokenizers, whose bytes are not text."""
    with pytest.raises(ValueError, match=message):
        decode(row)


def test_size_of_texts_is_limited(tiktoken_cl100k: Encoding) -> None:
    """A token can have 128 bytes, so that a small request could contain a large text."""
    (spaces,) = tiktoken_cl100k.encode(" " * 80)
    assert cl100k.decode([spaces] * 100, max_bytes=8000) == " " * 8000
    with pytest.raises(BodyTooLargeError):
        cl100k.decode([spaces] * 101, max_bytes=8000)


def test_file_is_checked(tmp_path: Path) -> None:
    """A file that is missing, damaged or different is an error, not other texts."""
    file = tmp_path / "cl100k_base.xz"
    with pytest.raises(LoadError, match=r"cl100k_base\.xz is missing or damaged"):
        cl100k.load_vocabulary(file)
    original = cl100k.FILE.read_bytes()
    file.write_bytes(original[:1000])
    with pytest.raises(LoadError, match="is missing or damaged"):
        cl100k.load_vocabulary(file)
    contents = bytearray(lzma.decompress(original))
    contents[-1] ^= 1
    for changed in (contents, contents + b"x", b""):
        file.write_bytes(lzma.compress(changed, preset=0))
        with pytest.raises(LoadError, match="does not contain the vocabulary"):
            cl100k.load_vocabulary(file)


def test_needs_neither_network_nor_tiktoken() -> None:
    """In a process in which tiktoken cannot be imported, and whose requests would go to a port that is closed."""
    code = """
import sys
sys.modules["tiktoken"] = None
from emb_model_provider.serving import cl100k
print(cl100k.decode([15339, 1917], 100))
"""
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | NO_NETWORK, capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("hello world\n", 0), run.stderr
