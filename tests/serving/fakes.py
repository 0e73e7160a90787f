"""A backend with predictable vectors, which fails, blocks or returns invalid vectors on demand."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from emb_model_provider.backends.base import ModelDescription, Outputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from emb_model_provider.backends.base import TokenBatch

WORDS = [f"w{i}" for i in range(4000)]
FAILS, NOT_FINITE, NEVER_FINITE, BREAKS, LOSES_GPU = "w98", "w99", "w97", "w96", "w95"
"""Words for which a batch raises, a vector is not finite, not even at fp32, every later batch raises, and CUDA fails."""


def word_tokenizer() -> Tokenizer:
    """Return a tokenizer of whole words between [CLS] and [SEP], so that tests can count tokens."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


IDS = {word: word_tokenizer().token_to_id(word) for word in WORDS}


def describe(**changes: object) -> ModelDescription:
    """Describe a model of 4 dimensions and 16 tokens."""
    fields = {
        "dimension": 4, "max_length": 16, "vocab_size": 4 + len(WORDS), "tokenizer_json": word_tokenizer().to_str(),
        "pad_token_id": 0, "padding_side": "right", "normalize": False, "pooling": "mean", "prompts": {},
        "default_prompt": None, "excludes_prompt": False, "matryoshka": None, "precision": "fp32",
        "device": "cpu", "backend": "torch", **changes,
    }  # fmt: skip
    return ModelDescription(**fields)  # type: ignore[arg-type]


def expected(ids: list[int]) -> list[float]:
    """Return the vector of the fake for a row of token ids. It depends on the ids, their number and their order."""
    return [float(sum(ids)), float(len(ids)), float(ids[-2]) if len(ids) > 1 else 0.0, 1.0]


class FakeBackend:
    """Returns `expected` vectors, records its batches, and blocks while `gate` is closed."""

    def __init__(self, description: ModelDescription | None = None, streams: int = 1, memory_bytes: int = 1000) -> None:
        self.streams = streams
        self.memory_bytes = memory_bytes
        self.description = description or describe()
        self.batches: list[list[list[int]]] = []
        self.tasks: list[str | None] = []
        """The task of each input of all batches."""
        self.threads: set[str] = {threading.current_thread().name}
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.let_through = threading.Event()
        """Lets later batches through a closed gate."""
        self.closed = False
        self.broken = False
        self.max_tokens: int | None = None
        """Padded tokens of a batch that fit into memory; None: any number."""
        self.running_batches = 0
        """Number of threads that are in `run`."""
        self.running_inputs = 0
        """Number of inputs that are in `run`."""
        self._lock = threading.Lock()

    def run(self, batch: TokenBatch) -> Outputs:
        with self._lock:
            self.running_batches += 1
            self.running_inputs += len(batch.ids)
        try:
            return Outputs(dense=self._embed(batch))
        finally:
            with self._lock:
                self.running_batches -= 1
                self.running_inputs -= len(batch.ids)

    def _embed(self, batch: TokenBatch) -> NDArray[np.float32]:
        self.entered.set()
        if not self.let_through.is_set() and not self.gate.wait(120):
            raise TimeoutError("the test never opened the gate")
        rows = [list(row) for row in batch.ids]
        self.threads.add(threading.current_thread().name)
        self.batches.append(rows)
        self.tasks += batch.tasks or [None] * len(rows)
        if any(IDS[LOSES_GPU] in row for row in rows):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.broken |= any(IDS[BREAKS] in row for row in rows)
        if self.broken or any(IDS[FAILS] in row for row in rows):
            raise RuntimeError("planted")
        if self.max_tokens is not None and len(rows) * max(map(len, rows)) > self.max_tokens:
            raise RuntimeError("CUDA error: out of memory")
        vectors = np.array([expected(row) for row in rows], dtype=np.float32)
        for i, row in enumerate(rows):
            if IDS[NOT_FINITE] in row or IDS[NEVER_FINITE] in row:
                vectors[i, 2] = np.nan
        return vectors

    def run_fp32(self, batch: TokenBatch) -> Outputs:
        if any(IDS[NEVER_FINITE] in row for row in batch.ids):
            return Outputs(dense=np.full((len(batch.ids), self.description.dimension), np.inf, dtype=np.float32))
        return Outputs(dense=np.array([expected(list(row)) for row in batch.ids], dtype=np.float32))

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.closed = True
