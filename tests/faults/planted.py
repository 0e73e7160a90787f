"""A backend that fails in many ways if a text contains a reserved word.

The words are ordinary ones of one token each, so that any model can be used. Faults that affect a whole process or
backend require a switch too, so that a client that sends its request again is not affected again.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import numpy as np
from tokenizers import Tokenizer

from emb_model_provider.backends.base import Outputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import Backend, TokenBatch

Fault = Literal["raise", "memory-one", "exit", "nan", "nan-always", "slow", "hang", "segv", "broken"]
Switch = Literal["calm", "watch", "pace", "memory", "hang", "segv", "broken", "no-load", "on-batch"]
"""Files that tests write.

- `calm`: the words have no effect.
- `watch`: each forward pass is recorded.
- `pace`: each stream takes its time instead of computing, as many padded tokens per second as its value says, and returns
  `stand_in_vectors`. So a test of a slow model does not slow down the machine.
- `memory`: batches with more padded tokens than its value do not fit into memory.
- `hang`: its word blocks while the switch is on.
- `segv`, `broken`: the next such word crashes the process, or breaks the backend until it is loaded again.
- `no-load`: loading fails.
- `on-batch`: recording the next batch raises its value, RuntimeError or SystemExit.
"""

WORDS: dict[Fault, str] = {
    "raise": "volcano",
    "memory-one": "mammoth",
    "exit": "shattered",
    "nan": "phantom",
    "nan-always": "zombie",
    "slow": "turtle",
    "hang": "glacier",
    "segv": "explosion",
    "broken": "vampire",
}
SLOW_S = 0.2


class Control:
    """A directory for the communication with the service: switches to the service, and a journal from it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._journal = directory / "journal.jsonl"

    def arm(self, switch: Switch, alias: str, value: str = "") -> None:
        path = self._path(switch, alias)
        written = path.with_name(f"{path.name}.new")
        written.write_text(value, encoding="utf-8")
        written.replace(path)

    def disarm(self, switch: Switch, alias: str) -> None:
        self._path(switch, alias).unlink(missing_ok=True)

    def value(self, switch: Switch, alias: str) -> str | None:
        """Return the value of a switch, or None if it is off."""
        with suppress(FileNotFoundError):
            return self._path(switch, alias).read_text(encoding="utf-8")
        return None

    def take(self, switch: Switch, alias: str) -> str | None:
        """Turn a switch off, and return its value, or None if it is off. Only one of several callers gets the value."""
        path = self._path(switch, alias)
        taken = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.rename(taken)
        except FileNotFoundError:
            return None
        value = taken.read_text(encoding="utf-8")
        taken.unlink()
        return value

    def record(self, event: str, **fields: Any) -> None:
        """Append a line to the journal. Safe between threads and processes."""
        line = json.dumps({"event": event, "pid": os.getpid(), **fields}) + "\n"
        journal = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(journal, line.encode())
        finally:
            os.close(journal)

    def events(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the lines of the journal that have this kind and these fields, in order."""
        text = self._journal.read_text(encoding="utf-8") if self._journal.exists() else ""
        lines: Iterable[dict[str, Any]] = map(json.loads, text.rpartition("\n")[0].splitlines())
        return [line for line in lines if ({"event": event} | fields).items() <= line.items()]

    def _path(self, switch: Switch, alias: str) -> Path:
        return self._directory / f"{switch}.{quote(alias, safe='')}"


class FaultyBackend:
    """A real backend with faults before and after its forward pass."""

    def __init__(self, backend: Backend, alias: str, control: Control) -> None:
        self.description = backend.description
        self.streams = backend.streams
        self._backend = backend
        self._alias = alias
        self._control = control
        self._broken = False
        tokenizer = Tokenizer.from_str(backend.description.tokenizer_json)
        self._ids = {_only_id(tokenizer, word): fault for fault, word in WORDS.items()}

    def run(self, batch: TokenBatch) -> Outputs:
        if (pace := self._control.value("pace", self._alias)) is not None:
            time.sleep(len(batch.ids) * max(map(len, batch.ids)) / float(pace))
            return Outputs(dense=stand_in_vectors(batch.ids, self.description.dimension))
        self._before(batch)
        return Outputs(dense=self._spoil(self._backend.run(batch).dense, batch, ("nan", "nan-always")))

    def run_fp32(self, batch: TokenBatch) -> Outputs:
        self._control.record("fp32", alias=self._alias, rows=len(batch.ids))
        return Outputs(dense=self._spoil(self._backend.run_fp32(batch).dense, batch, ("nan-always",)))

    def close(self) -> None:
        self._backend.close()

    def __getattr__(self, name: str) -> Any:
        # Other attributes are those of the real backend.
        return getattr(self._backend, name)

    def _before(self, batch: TokenBatch) -> None:
        control, alias = self._control, self._alias
        padded = len(batch.ids) * max(map(len, batch.ids))
        if control.value("watch", alias) is not None:
            control.record("batch", alias=alias, rows=len(batch.ids), padded=padded)
        if self._broken:
            raise RuntimeError("planted: the device is lost")
        limit = control.value("memory", alias)
        if limit and padded > int(limit):
            self._record("memory", batch, padded=padded)
            raise MemoryError("planted: the batch is too large")
        faults = {fault for row in batch.ids for fault in self._faults_of(row)}
        if faults and control.value("calm", alias) is None:
            self._fail(faults, batch)

    def _fail(self, faults: set[Fault], batch: TokenBatch) -> None:
        control, alias = self._control, self._alias
        if "hang" in faults and control.value("hang", alias) is not None:
            self._record("hang", batch)
            while control.value("hang", alias) is not None:
                time.sleep(0.01)
        if "segv" in faults and control.take("segv", alias) is not None:
            self._record("segv", batch)
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(60)
        if "broken" in faults and control.take("broken", alias) is not None:
            self._record("broken", batch)
            self._broken = True
            raise RuntimeError("planted: the device is lost")
        if "slow" in faults:
            time.sleep(SLOW_S)
        errors: dict[Fault, BaseException] = {
            "raise": RuntimeError("planted: invalid input"),
            "memory-one": MemoryError("planted: input too large"),
            "exit": SystemExit("planted: end of the thread"),
        }
        for fault, error in errors.items():
            if fault in faults:
                self._record(fault, batch)
                raise error

    def _spoil(self, vectors: NDArray[np.float32], batch: TokenBatch, faults: tuple[Fault, ...]) -> NDArray[np.float32]:
        for index, row in enumerate(batch.ids):
            for fault in self._faults_of(row):
                if fault in faults and self._control.value("calm", self._alias) is None:
                    self._record(fault, batch)
                    vectors[index, 0] = np.nan
        return vectors

    def _faults_of(self, row: Iterable[int]) -> list[Fault]:
        return [self._ids[token] for token in self._ids.keys() & set(row)]

    def _record(self, fault: str, batch: TokenBatch, **fields: Any) -> None:
        self._control.record("fault", kind=fault, alias=self._alias, rows=len(batch.ids), **fields)


def stand_in_vectors(rows: Sequence[Sequence[int]], dimension: int) -> NDArray[np.float32]:
    """Return a vector of length 1 for each row, which depends on all its token ids."""
    vectors = np.zeros((len(rows), dimension), dtype=np.float32)
    vectors[range(len(rows)), [sum(row) % dimension for row in rows]] = 1
    return vectors


def _only_id(tokenizer: Tokenizer, word: str) -> int:
    ids: list[int] = tokenizer.encode(word, add_special_tokens=False).ids
    if len(ids) != 1:
        raise ValueError(f"{word!r} has {len(ids)} tokens in this model, not one")
    return ids[0]
