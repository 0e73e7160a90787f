"""Runs the real service as a process, as a user starts it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

BUNDLED = "sentence-transformers/all-MiniLM-L6-v2"
COMMAND = [sys.executable, "-m", "emb_model_provider.main"]
_FOREIGN = re.compile(
    r"(EMB_PROVIDER_|HF_|HUGGING|MODELSCOPE_|MODEL_HUB|MODEL_CACHE_DIR|OMP_WAIT|USE_MODELSCOPE|TRANSFORMERS_|.*_proxy$)",
    re.IGNORECASE,
)
NO_NETWORK = dict.fromkeys(
    ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "https_proxy", "http_proxy"), "http://localhost:9"
)
"""Environment of processes whose requests must not leave the machine: a proxy on a port that is closed."""
_CHILD = re.compile(r"the service is process (\d+)")
_START_S, _STOP_S = 560.0, 90.0
"""Reached only if something is wrong, even on a slow machine."""


def environment(directory: Path, **settings: str) -> dict[str, str]:
    """Return the environment of a service with these settings (named without their prefix) and no others."""
    inherited = {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}
    if not Path(settings.get("CACHE_DIR", directory)).is_relative_to(directory):
        # Other services put models into a shared cache, which this one would list.
        settings = {"SERVE_CACHED": "false"} | settings
    return inherited | {
        "EMB_PROVIDER_CACHE_DIR": str(directory / "cache"),
        "OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1)),
        # A further process with torch would take the processors from the compiler. Its own tests turn it on.
        "EMB_PROVIDER_TORCH_WHILE_COMPILING": "false",
        "EMB_PROVIDER_TUNE_S": "0",
        **{f"EMB_PROVIDER_{name}": value for name, value in settings.items()},
    }


def free_port() -> int:
    """Return a free port, below the range that the system assigns to connections."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port
    raise AssertionError("no free port found")


class Service:
    """A running service. A context manager that stops it."""

    def __init__(
        self, directory: Path, *, stderr: int | None = None, command: Sequence[str] | None = None, **settings: str
    ) -> None:
        """Start the process.

        Args:
            directory: Its working directory, which is created.
            stderr: File descriptor for its stderr; None: a file.
            command: The command line; None: that of the service.
            settings: Its settings, named without their prefix.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = free_port()
        self.url = f"http://localhost:{self.port}"
        self._stderr_file = directory / "stderr.txt"
        with self._stderr_file.open("wb") as file:
            self.process = subprocess.Popen(
                command or COMMAND,
                cwd=directory,
                env=environment(directory, PORT=str(self.port), **settings),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file if stderr is None else stderr,
            )
        self.http = httpx.Client(base_url=self.url, timeout=240.0, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.stop()

    @property
    def child(self) -> int:
        """Process id of the service, if a supervisor runs it; the latest one."""
        wait_until(lambda: _CHILD.search(self.stderr_text()))
        return int(_CHILD.findall(self.stderr_text())[-1])

    def wait(self, path: str = "/ready") -> Self:
        """Wait until the service answers `path` with 200."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"exit code {self.process.returncode}: {self.stderr_text()}")
            try:
                if self.http.get(path).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready within {_START_S:g} s: {self.stderr_text()}")

    def wait_for_state(self, alias: str, state: str) -> Self:
        """Wait until a model is in `state`."""
        self.wait("/health")
        wait_until(lambda: self.http.get("/ready").json()["models"][alias]["state"] == state, _START_S)
        return self

    def embed(self, *inputs: Any, **fields: Any) -> httpx.Response:
        """Request embeddings of one input, or of several as an array."""
        value = inputs[0] if len(inputs) == 1 else list(inputs)
        return self.http.post("/v1/embeddings", json={"input": value, **fields})

    def post(self, body: bytes | str) -> httpx.Response:
        """Request embeddings with a body that is sent unchanged."""
        return self.http.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})

    def figure(self, name: str, **labels: str) -> float:
        """Return the value of a metric, summed over the labels that are not passed; 0 without samples."""
        total = 0.0
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self.signal()
        return self.ended()

    def ended(self) -> int:
        """Wait for the end of the process, and return its exit code."""
        try:
            return self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the process did not end within {_STOP_S:g} s: {self.stderr_text()}") from None

    def log_text(self) -> str:
        """Return the content of the log file."""
        return (self.directory / "logs" / "emb_model_provider.log").read_text(encoding="utf-8")

    def log_lines(self, **fields: Any) -> list[dict[str, Any]]:
        """Return the JSON lines of the log file that have these fields."""
        # The text after the last line break is an incomplete line.
        complete, _, _ = self.log_text().rpartition("\n")
        lines: list[dict[str, Any]] = [json.loads(line) for line in complete.splitlines()]
        return [line for line in lines if fields.items() <= line.items()]

    def logged(self, **fields: Any) -> list[dict[str, Any]]:
        """Wait for a line of the log file that has these fields, and return all such lines."""
        wait_until(lambda: self.log_lines(**fields))
        return self.log_lines(**fields)

    def stderr_text(self) -> str:
        return self._stderr_file.read_text(encoding="utf-8", errors="replace")


def wait_until(condition: Any, timeout_s: float = 120.0) -> None:
    """Wait until `condition()` is true, or fail."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"the condition did not become true within {timeout_s:g} s")
        time.sleep(0.02)


def file_sizes(directory: Path, pattern: str = "*") -> list[int]:
    """Return the sizes of the files below a directory that others write to: files can disappear meanwhile."""
    sizes = []
    for path in directory.rglob(pattern):
        with suppress(FileNotFoundError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                sizes.append(status.st_size)
    return sizes


@contextmanager
def no_more_threads() -> Iterator[None]:
    """Let every start of a thread in this process fail, as at the limit of the system: no memory has such a stack."""
    threading.stack_size(2**46)
    try:
        yield
    finally:
        threading.stack_size(0)


def assert_error(
    response: httpx.Response,
    status: int,
    code: str | None,
    *,
    param: str | None = None,
    phrase: str = "",
    type: str = "invalid_request_error",  # noqa: A002 - name of the JSON field
) -> None:
    """Check that a response is an error with exactly the fields of the OpenAI API."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"], error["type"]) == (code, param, type), error
    assert phrase in error["message"]
    assert error["message"]
    assert "Traceback" not in error["message"]
