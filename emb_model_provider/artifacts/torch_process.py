"""Runs a model with torch at fp32 in a child process, as a backend, until the model is compiled.

When the child ends, all memory of torch is free again, and the service has never imported it. The parent sends a job, then
one batch after the other, each as a line of JSON on stdin of the child. The child answers on its stdout: its description,
then the vectors of each batch, as a line of JSON that is followed by the bytes of their values.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import threading
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from emb_model_provider.artifacts.compiler_process import (
    child_environment,
    kill_group,
    read_snapshot,
    read_spec,
    without_access,
)
from emb_model_provider.artifacts.manifest import read_description
from emb_model_provider.backends.base import Outputs, SparseVector
from emb_model_provider.backends.hardware import usable_cpus
from emb_model_provider.concurrency import start_thread
from emb_model_provider.errors import InferenceError, LoadError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import IO

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription, TokenBatch
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.progress import CancelToken
    from emb_model_provider.snapshots.snapshot import Snapshot

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "emb_model_provider.compiler.interim")
_KEPT_LINES = 20
_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchJob:
    """A model to run."""

    spec: ModelSpec
    snapshot: Snapshot
    trust_remote_code: bool
    threads: int
    parent: int = field(default_factory=os.getpid)
    """Process id of the service; the child ends when it ends."""

    def to_line(self) -> str:
        return json.dumps(asdict(replace(self, spec=without_access(self.spec))), default=os.fspath) + "\n"

    @classmethod
    def from_line(cls, line: str) -> TorchJob:
        values = json.loads(line)
        return cls(**values | {"spec": read_spec(values["spec"]), "snapshot": read_snapshot(values["snapshot"])})


class TorchProcess:
    """The backend in the service. One thread creates, uses and closes it."""

    streams = 1

    def __init__(self, spec: ModelSpec, snapshot: Snapshot, *, trust_remote_code: bool, cancel: CancelToken) -> None:
        """Start the child and wait until it has loaded the model, or until `cancel` is cancelled.

        Raises:
            LoadError: The child cannot load the model, or has ended.
            OperationCancelledError: `cancel` was cancelled.
        """
        job = TorchJob(
            spec=replace(spec, backend="torch", device="cpu", precision="fp32"),
            snapshot=snapshot,
            trust_remote_code=trust_remote_code,
            threads=usable_cpus(),
        )
        self._model = spec.alias
        self._stderr: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process = subprocess.Popen(  # noqa: S603 - our own module, run by our own interpreter
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=child_environment(job.threads),
        )
        self._reader = threading.Thread(target=self._keep_stderr, daemon=True)
        watching = threading.Event()
        try:
            start_thread(self._reader)
            start_thread(threading.Thread(target=self._kill_if_cancelled, args=(cancel, watching), daemon=True))
            self._send(job.to_line())
            described = read_description(self._receive()["description"])
            self.description: ModelDescription = replace(
                described, is_interim=True, notes=(*described.notes, "served by torch until it is compiled")
            )
            self.memory_bytes = psutil.Process(self._process.pid).memory_info().rss
        except BaseException as error:
            self.close()
            cancel.raise_if_cancelled()
            if isinstance(error, InferenceError | psutil.Error):
                raise LoadError(f"torch cannot run it in a process of its own: {error}") from error
            raise
        finally:
            watching.set()

    def run(self, batch: TokenBatch) -> Outputs:
        self._send(json.dumps(asdict(batch)) + "\n")
        arrays = {name: self._read_array(shape, dtype) for name, shape, dtype in self._receive()["arrays"]}
        return outputs_of(arrays)

    def run_fp32(self, batch: TokenBatch) -> Outputs:
        return self.run(batch)

    def _read_array(self, shape: Sequence[int], dtype: str) -> NDArray[Any]:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        content = self._stdout.read(size)
        if len(content) < size:
            raise InferenceError(self._describe_end())
        return np.frombuffer(content, dtype=dtype).reshape(shape).copy()

    def close(self) -> None:
        kill_group(self._process)
        if self._reader.ident is not None:  # it was started
            self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    @property
    def _stdout(self) -> IO[bytes]:
        if self._process.stdout is None:
            raise RuntimeError("the child was started without a pipe")
        return self._process.stdout

    def _send(self, line: str) -> None:
        try:
            if self._process.stdin is not None:
                self._process.stdin.write(line.encode())
                self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise InferenceError(self._describe_end()) from error

    def _receive(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(self._stdout.readline())
        except (OSError, ValueError) as error:  # an empty line: the child has ended
            raise InferenceError(self._describe_end()) from error
        if "error" in answer:
            raise InferenceError(answer["error"])
        return answer

    def _describe_end(self) -> str:
        code = self._process.wait()
        return f"the torch process of model {self._model} ended ({code}): {self._stderr[-1] if self._stderr else '-'}"

    def _keep_stderr(self) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stderr or ():
                text = line.decode(errors="replace").strip()
                if text:
                    self._stderr.append(text[:300])
                    logger.debug("model %s: torch process: %s", self._model, text)

    def _kill_if_cancelled(self, cancel: CancelToken, done: threading.Event) -> None:
        while not done.wait(_POLL_S):
            if cancel.is_cancelled:
                kill_group(self._process)
                return


def arrays_of(outputs: Outputs) -> dict[str, NDArray[Any]]:
    """Return the results of a batch as arrays; ragged rows as one array, with the lengths of the rows."""
    arrays: dict[str, NDArray[Any]] = {}
    if outputs.dense is not None:
        arrays["dense"] = outputs.dense
    if outputs.scores is not None:
        arrays["scores"] = outputs.scores
    if outputs.sparse is not None:
        arrays["sparse_lengths"] = np.array([len(vector.values) for vector in outputs.sparse], dtype=np.int32)
        arrays["indices"] = np.concatenate([vector.indices for vector in outputs.sparse])
        arrays["values"] = np.concatenate([vector.values for vector in outputs.sparse])
    if outputs.multi_vector is not None:
        arrays["token_lengths"] = np.array([len(vectors) for vectors in outputs.multi_vector], dtype=np.int32)
        arrays["tokens"] = np.concatenate(outputs.multi_vector)
    return arrays


def outputs_of(arrays: Mapping[str, NDArray[Any]]) -> Outputs:
    """Return the results that `arrays_of` has made arrays of."""
    sparse = multi_vector = None
    if "indices" in arrays:
        ends = np.cumsum(arrays["sparse_lengths"])[:-1]
        parts = zip(np.split(arrays["indices"], ends), np.split(arrays["values"], ends), strict=True)
        sparse = [SparseVector(indices, values) for indices, values in parts]
    if "tokens" in arrays:
        multi_vector = np.split(arrays["tokens"], np.cumsum(arrays["token_lengths"])[:-1])
    return Outputs(dense=arrays.get("dense"), scores=arrays.get("scores"), sparse=sparse, multi_vector=multi_vector)
