"""Repositories for the tests of transfers."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

from tests.service import environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.transfer.servers import DestinationServer, SourceServer

SOURCE, DESTINATION = "acme/tiny", "mirrors/tiny"
TOKEN = "ms-s3cret"
README = b"---\nlicense: mit\ntags:\n- test\n---\n# tiny\n"
WEIGHTS = random.Random(5).randbytes(3_000_000)  # noqa: S311 - bytes that do not compress


def model_files(seed: int = 0) -> dict[str, bytes]:
    """Return a repository with weights, small files, and a tokenizer that one hub keeps in LFS and the other does not."""
    return {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": README,
        "config.json": json.dumps({"model_type": "bert", "seed": seed}).encode(),
        "1_Pooling/config.json": b'{"word_embedding_dimension": 8}',
        "vocab.txt": b"[PAD]\n[UNK]\n" * 100,
        "model.safetensors": WEIGHTS if seed == 0 else random.Random(seed).randbytes(20_000),  # noqa: S311 - likewise
    }


def mirrored(source: SourceServer, destination: DestinationServer, src: str = SOURCE, dst: str = DESTINATION) -> bool:
    """Return whether the destination has all files of the source with right bytes."""
    expected = set(source.repos[src]) - {".gitattributes"}
    return expected <= set(destination.repos[dst]) and destination.wrong_files(dst, source.repos[src]) == []


def user(directory: Path, source: SourceServer, destination: DestinationServer) -> dict[str, str]:
    """Return an environment whose home, temporary files and cache are below `directory`."""
    for name in ("home", "tmp"):
        (directory / name).mkdir(exist_ok=True)
    return environment(
        directory,
        HF_ENDPOINT=source.url,
        HF_TOKEN="hf-s3cret",
        MODELSCOPE_ENDPOINT=destination.url,
        MODELSCOPE_TOKEN=TOKEN,
    ) | {
        "HOME": str(directory / "home"),
        "TMPDIR": str(directory / "tmp"),
        "MODELSCOPE_API_MAX_RETRIES": "1",
        "NO_PROXY": "localhost,127.0.0.1",
    }
