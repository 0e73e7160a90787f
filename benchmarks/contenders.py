"""The servers that are compared: how each is started, checked for readiness, and stopped."""

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
from typing import TYPE_CHECKING, Self, TypeVar

from benchmarks import CACHE, ROOT
from benchmarks.report import log_progress
from emb_model_provider.hubs.local import find_bundled
from emb_model_provider.model_spec import BUNDLED_MODEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

T = TypeVar("T")

_START_TIMEOUT_S = 900.0
"""The first start of our service compiles its models."""
_STOP_TIMEOUT_S = 30.0
_REMOVED_VARIABLES = re.compile(
    r"EMB_PROVIDER_|INFINITY_|HF_|HUGGING|MODELSCOPE_|MODEL_HUB|USE_MODELSCOPE|TRANSFORMERS_|TOKENIZERS_"
    r"|OMP_|MKL_|KMP_|OPENBLAS_|TORCH|PYTHONDONTWRITEBYTECODE|.*_proxy$",
    re.IGNORECASE,
)
"""Environment variables that would change the defaults of a server."""
SERVICE_CACHE = CACHE / "service"
"""Compiled models of our service, separate from those of the user."""
OURS: dict[str, dict[str, str]] = {
    "ours": {},
    "ours-fp32": {"MODEL_PRECISION": "fp32"},
    "ours-torch": {"BACKEND": "torch"},
}
"""Our service: contender to settings."""
INFINITY: dict[str, list[str]] = {
    "infinity": [],
    "infinity-bf16": ["--dtype", "bfloat16"],
    "infinity-nowarmup": ["--no-model-warmup"],
}
"""infinity: contender to additional arguments."""
SERVERS = (*OURS, *INFINITY, "naive")
_INFINITY_PACKAGE = "infinity-emb[torch,server,optimum]==0.0.78"
_PRINT_VERSIONS = """
from importlib.metadata import version
packages = ("infinity-emb", "torch", "transformers", "sentence-transformers")
print(", ".join(f"{package} {version(package)}" for package in packages))
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that can be started."""

    name: str
    command: tuple[str, ...]
    """`{port}` is replaced by the port."""
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/health"


def make_contender(name: str, *, infinity: Path | None = None, cache: Path | None = None) -> Contender:
    """Return a contender by its name.

    Args:
        name: A name of `SERVERS`.
        infinity: A virtual environment with infinity. None: it is created in the cache of the benchmarks.
        cache: Directory for the compiled models of our service. None: the cache of the benchmarks.
    """
    check_names([name], SERVERS, "contender")
    if name in OURS:
        # Without the result cache, because the load generators repeat their requests.
        # And without torch, which would answer the first requests if the model has to be compiled.
        settings = {"HOST": "127.0.0.1", "PORT": "{port}", "RESULT_CACHE_MB": "0", "TORCH_WHILE_COMPILING": "false"}
        settings |= OURS[name]
        settings["CACHE_DIR"] = str(cache or SERVICE_CACHE)
        environment = {f"EMB_PROVIDER_{key}": value for key, value in settings.items()}
        return Contender(name, (sys.executable, "-m", "emb_model_provider.main"), environment, "/ready")
    if name in INFINITY:
        command = (
            str(_infinity_environment(infinity) / "bin" / "infinity_emb"), "v2",
            "--model-id", str(find_bundled()), "--served-model-name", BUNDLED_MODEL,
            "--engine", "torch", "--device", "cpu", "--no-bettertransformer", "--url-prefix", "/v1",
            "--host", "127.0.0.1", "--port", "{port}", *INFINITY[name],
        )  # fmt: skip
        environment = {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"}
        return Contender(name, command, environment)
    command = (
        sys.executable, "-P", str(ROOT / "benchmarks" / "naive.py"),
        "--model", str(find_bundled()), "--port", "{port}",
    )  # fmt: skip
    return Contender(name, command, {"HF_HUB_OFFLINE": "1"})


def check_names(names: Iterable[str], known: Iterable[str], noun: str) -> None:
    """Exit with a message if a name that the user wrote is not known."""
    for name in names:
        if name not in known:
            raise SystemExit(f"error: unknown {noun} {name!r}. Choose from: {', '.join(known)}.")


def alternate(contenders: Sequence[T], round_number: int) -> list[T]:
    """Return the contenders in the order of a round.

    Each round begins with another one, so that no contender always runs after the same other one.
    """
    first = round_number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def clean_environment() -> dict[str, str]:
    """Return the environment of this process without variables that change the defaults of a server."""
    return {name: value for name, value in os.environ.items() if not _REMOVED_VARIABLES.match(name)}


def infinity_notes(contenders: Iterable[str], directory: Path | None) -> list[str]:
    """Return the versions in the environment of infinity if it is one of the contenders."""
    if not any(name in INFINITY for name in contenders):
        return []
    environment = _infinity_environment(directory)
    command = [str(environment / "bin" / "python"), "-c", _PRINT_VERSIONS]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=environment)
    return [f"infinity's environment: {result.stdout.strip()}"]


class Server:
    """A running contender. A context manager that stops it."""

    def __init__(self, contender: Contender, directory: Path) -> None:
        """Start the process.

        Args:
            contender: The server.
            directory: Its working directory, which also gets its log.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.contender = contender
        self.port = free_port()
        self._log = directory / f"{contender.name}.log"
        environment = {name: value.replace("{port}", str(self.port)) for name, value in contender.environment.items()}
        self.started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [part.replace("{port}", str(self.port)) for part in contender.command],
                cwd=directory,
                env=clean_environment() | environment,
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

    def wait(self) -> Self:
        """Wait until the server is ready.

        Raises:
            RuntimeError: It has ended, or is not ready in time.
        """
        self._wait_for_200("GET", self.contender.ready_path, None)
        return self

    def time_to_first_vector(self, body: str) -> float:
        """Send a request every 10 ms until it succeeds. Return the seconds since the start of the process.

        Raises:
            RuntimeError: The server has ended, or does not respond with 200 in time.
        """
        self._wait_for_200("POST", "/v1/embeddings", body)
        return time.perf_counter() - self.started

    def post(self, body: str) -> tuple[int, bytes]:
        """Send a request to `/v1/embeddings`. Return the status and the body of the response."""
        return self._request("POST", "/v1/embeddings", body)

    def get(self, path: str) -> str:
        """Return the body of the response to a GET request."""
        return self._request("GET", path, None)[1].decode()

    def kill(self) -> None:
        """Send SIGKILL to the process, and wait for its end."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Send SIGTERM, and after 30 s kill the process and its children."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # its group, because it leads its own session
            self._process.wait()

    def _wait_for_200(self, method: str, path: str, body: str | None) -> None:
        deadline = time.perf_counter() + _START_TIMEOUT_S
        last = "no response"
        while time.perf_counter() < deadline:
            if (code := self._process.poll()) is not None:
                raise RuntimeError(f"{self.contender.name} ended with exit code {code}:\n{self._end_of_log()}")
            try:
                status, response = self._request(method, path, body)
            except OSError as error:
                last = str(error)
            else:
                if status == 200:
                    return
                last = f"{status}: {response[:200]!r}"
                if b'"failed"' in response:  # our /ready reports a model that cannot be loaded
                    break
            time.sleep(0.01)
        elapsed_s = time.perf_counter() - self.started
        raise RuntimeError(
            f"{self.contender.name}: {path} did not respond with 200 within {elapsed_s:.0f} s ({last}).\n"
            f"{self._end_of_log()}"
        )

    def _request(self, method: str, path: str, body: str | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _end_of_log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-2000:]


def stop_servers_on_sigterm() -> None:
    """Let SIGTERM unwind the stack, so that servers are stopped and directories are removed."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _infinity_environment(directory: Path | None) -> Path:
    """Return a virtual environment with infinity, which is created if no directory is given.

    infinity needs other versions of transformers and numpy than this package.
    """
    environment = directory.absolute() if directory is not None else CACHE / "infinity-0.0.78"
    if (environment / "bin" / "infinity_emb").exists():
        return environment
    if directory is not None:
        raise SystemExit(f"error: --infinity {directory}: it does not contain bin/infinity_emb.")
    log_progress(f"installing {_INFINITY_PACKAGE}")
    environment.parent.mkdir(parents=True, exist_ok=True)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", python, str(environment)], check=True)
    subprocess.run(
        ["uv", "pip", "install", "--quiet", "--python", str(environment / "bin" / "python"), _INFINITY_PACKAGE],
        check=True,
        cwd=environment,  # outside the repository, because uv applies the constraints of its pyproject.toml
    )
    return environment


def free_port() -> int:
    """Return a free port below the range from which the system chooses ports of outgoing connections."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("100 ports are in use.")
