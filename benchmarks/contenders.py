"""The servers that are compared: how each is started, asked whether it is ready, and stopped."""

from __future__ import annotations

import http.client
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from benchmarks.cache import CACHE, ROOT
from benchmarks.peers import infinity_environment
from emb_model_provider.hubs.local import find_bundled
from emb_model_provider.model_spec import BUNDLED_MODEL

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

START_S = 180.0
_STOP_S = 30.0
_FOREIGN = re.compile(
    r"EMB_PROVIDER_|INFINITY_|HF_|HUGGING|MODELSCOPE_|MODEL_HUB|USE_MODELSCOPE|TRANSFORMERS_|TOKENIZERS_"
    r"|OMP_|MKL_|KMP_|OPENBLAS_|TORCH|PYTHONDONTWRITEBYTECODE|.*_proxy$",
    re.IGNORECASE,
)
"""Variables that would change what a server does by default."""
SERVICE_CACHE = CACHE / "service"
"""Where our service keeps compiled artifacts, apart from those of the user."""
OURS: dict[str, dict[str, str]] = {
    "ours": {},
    "ours-fp32": {"MODEL_PRECISION": "fp32"},
    "ours-torch": {"BACKEND": "torch"},
}
"""Our service: a contender's name to its settings."""
INFINITY: dict[str, list[str]] = {
    "infinity": [],
    "infinity-bf16": ["--dtype", "bfloat16"],
    "infinity-nowarmup": ["--no-model-warmup"],
}
"""infinity: a contender's name to what is added to its command."""
SERVERS = (*OURS, *INFINITY, "naive")


def plain_environment() -> dict[str, str]:
    """Return this process's environment without what would change a contender's defaults."""
    return {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that can be started."""

    name: str
    command: tuple[str, ...]
    """`{port}` stands for the port."""
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/health"


def contender(name: str, *, infinity: Path | None = None, cache: Path | None = None) -> Contender:
    """Return a contender by its name.

    `infinity` is an environment that holds infinity; by default one is made. `cache` is where our service keeps
    its artifacts; by default the benchmarks' own.
    """
    if name in OURS:
        settings = {
            "HOST": "127.0.0.1",
            "PORT": "{port}",
            "CACHE_DIR": str(cache or SERVICE_CACHE),
            **OURS[name],
        }
        environment = {f"EMB_PROVIDER_{key}": value for key, value in settings.items()}
        return Contender(name, (sys.executable, "-m", "emb_model_provider.main"), environment, ready="/ready")
    if name in INFINITY:
        program = infinity_environment(infinity) / "bin" / "infinity_emb"
        command = (
            str(program), "v2", "--model-id", str(find_bundled()), "--served-model-name", BUNDLED_MODEL,
            "--engine", "torch", "--device", "cpu", "--no-bettertransformer", "--url-prefix", "/v1",
            "--host", "127.0.0.1", "--port", "{port}", *INFINITY[name],
        )  # fmt: skip
        quiet = {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"}
        return Contender(name, command, quiet)
    if name == "naive":
        command = (
            sys.executable,
            "-P",
            str(ROOT / "benchmarks" / "naive.py"),
            "--model",
            str(find_bundled()),
        )
        return Contender(name, (*command, "--port", "{port}"), {"HF_HUB_OFFLINE": "1"})
    raise SystemExit(f"error: no contender is called {name!r}. There are: {', '.join(SERVERS)}.")


class Server:
    """A started contender; a context manager that stops it. Its working directory is `directory`."""

    def __init__(self, contender: Contender, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.contender = contender
        self.port = _free_port()
        self._log = directory / f"{contender.name}.log"
        own = {name: value.replace("{port}", str(self.port)) for name, value in contender.environment.items()}
        self.started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [part.replace("{port}", str(self.port)) for part in contender.command],
                cwd=directory,
                env=plain_environment() | own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait(self, timeout_s: float = START_S) -> Self:
        """Wait until the server says that it is ready."""
        self._wait_for_200("GET", self.contender.ready, None, timeout_s)
        return self

    def first_vector(self, body: str, timeout_s: float = START_S) -> float:
        """Ask again and again for a vector; return the seconds from the process's start to its arrival."""
        self._wait_for_200("POST", "/v1/embeddings", body, timeout_s)
        return time.perf_counter() - self.started

    def post(self, body: str) -> tuple[int, bytes]:
        """Return status and body of the answer to one request."""
        return self._ask("POST", "/v1/embeddings", body)

    def stop(self) -> None:
        """End the process with SIGTERM; after 30 s end it and what it started."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # a session of its own, so its pid is the group's
            self._process.wait()

    def _wait_for_200(self, method: str, path: str, body: str | None, timeout_s: float) -> None:
        give_up_at = time.perf_counter() + timeout_s
        last = "no answer"
        while time.perf_counter() < give_up_at:
            if (code := self._process.poll()) is not None:
                raise RuntimeError(f"{self.contender.name} ended with {code}:\n{self._log_end()}")
            try:
                status, answer = self._ask(method, path, body)
            except OSError as error:
                last = str(error)
            else:
                if status == 200:
                    return
                last = f"{status}: {answer[:200]!r}"
                if b'"failed"' in answer:  # how our /ready says that a model cannot be loaded
                    break
            time.sleep(0.01)
        waited = time.perf_counter() - self.started
        raise RuntimeError(
            f"{self.contender.name}: {path} not answered with 200 after {waited:.0f} s ({last}).\n{self._log_end()}"
        )

    def _ask(self, method: str, path: str, body: str | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _log_end(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-2000:]


def stop_servers_on_sigterm() -> None:
    """Let SIGTERM unwind the stack, so that servers are stopped and directories removed."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _free_port() -> int:
    """Return a port that nobody listens at, from below those that the system gives to connections."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("100 ports in use")
