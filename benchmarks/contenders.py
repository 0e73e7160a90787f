"""The servers that are compared: how each is started, checked for readiness, and stopped."""

from __future__ import annotations

import http.client
import os
import random
import re
import shutil
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


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment in the cache of the benchmarks, because its packages conflict with those of this project."""

    name: str
    packages: tuple[str, ...]
    program: str
    """A file in its `bin`, which shows that the packages are installed."""
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"

    def directory(self) -> Path:
        """Return its directory. Install the packages if they are missing."""
        environment = CACHE / self.name
        if (environment / "bin" / self.program).exists():
            return environment
        log_progress(f"installing {', '.join(self.packages)}")
        environment.parent.mkdir(parents=True, exist_ok=True)
        python = str(environment / "bin" / "python")
        subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", self.python, str(environment)], check=True)
        subprocess.run(
            ["uv", "pip", "install", "--quiet", "--python", python, *self.packages],
            check=True,
            cwd=environment,  # outside the repository, because uv applies the constraints of its pyproject.toml
        )
        return environment


_SERVER = ("fastapi", "uvicorn", "httptools", "uvloop")
INFINITY = Environment("infinity-0.0.78", ("infinity-emb[torch,server,optimum]==0.0.78",), "infinity_emb")
SENTENCE_TRANSFORMERS = Environment(
    "sentence-transformers-6.2.0", ("sentence-transformers[openvino]==6.2.0", *_SERVER), "uvicorn"
)
FASTEMBED = Environment("fastembed-0.9.1", ("fastembed==0.9.1", *_SERVER), "uvicorn")
LLAMA_CPP = Environment("llama-cpp-11549", ("xllamacpp==2026.10.11549", "gguf==0.19.0", "safetensors"), "gguf-dump")
SIE = Environment("sie-0.10.1", ("sie-server==0.10.1",), "sie-server", python="3.12")


@dataclass(frozen=True, slots=True)
class Peer:
    """A server of another project.

    In the command, `{bin}` is the directory of the environment's programs, `{benchmarks}` that of this file, `{model}` that of
    the bundled model or its converted form, and `{port}` the port.
    """

    environment: Environment
    command: tuple[str, ...]
    model: str | None = None
    """A format of `benchmarks/convert.py`, which is converted once."""
    converter: Environment | None = None
    """The environment that converts it, if it is not its own one."""
    ready_path: str = "/health"


def _infinity(*arguments: str, model: str | None = None) -> Peer:
    # With ONNX, infinity finds its file only in its working directory, and writes the optimized model to the cache of the hub.
    place = ("env", "--chdir={model}", "HF_HOME={model}/hub") if model else ()
    command = (
        *place, "{bin}/infinity_emb", "v2", "--model-id", "." if model else "{model}", "--served-model-name", BUNDLED_MODEL,
        "--device", "cpu", "--no-bettertransformer", "--url-prefix", "/v1", "--host", "127.0.0.1", "--port", "{port}",
        *arguments,
    )  # fmt: skip
    return Peer(INFINITY, command, model)


def _minimal(environment: Environment, library: str, model: str | None = None) -> Peer:
    """Return the minimal server with a library, and batches of the requests that arrive within 5 ms."""
    command = (
        "{bin}/python", "-P", "{benchmarks}/naive.py", "--library", library, "--batch-ms", "5", "--model", "{model}",
        "--port", "{port}",
    )  # fmt: skip
    return Peer(environment, command, model, INFINITY if model else None)


def _llama_cpp(model: str) -> Peer:
    return Peer(LLAMA_CPP, ("{bin}/python", "-P", "{benchmarks}/llama_cpp.py", "{model}/model.gguf", "{port}"), model)


PEERS: dict[str, Peer] = {
    "infinity": _infinity("--engine", "torch"),
    "infinity-bf16": _infinity("--engine", "torch", "--dtype", "bfloat16"),
    "infinity-nowarmup": _infinity("--engine", "torch", "--no-model-warmup"),
    "infinity-onnx": _infinity("--engine", "optimum", "--pooling-method", "mean", "--onnx-do-not-prefer-quantized", model="onnx"),
    "st-openvino": _minimal(SENTENCE_TRANSFORMERS, "openvino"),
    "fastembed": _minimal(FASTEMBED, "fastembed", "onnx"),
    "llamacpp": _llama_cpp("gguf-f16"),
    "llamacpp-q8": _llama_cpp("gguf-q8_0"),
    "sie": Peer(
        SIE,
        ("{bin}/sie-server", "serve", "--device", "cpu", "--models-dir", "{model}", "--models", BUNDLED_MODEL,
         "--preload", BUNDLED_MODEL, "--host", "127.0.0.1", "--port", "{port}"),
        "sie",
        ready_path="/readyz",
    ),
}  # fmt: skip
"""Servers of other projects."""
SERVERS = (*OURS, *PEERS, "naive")
_VERSIONS = ("infinity-emb", "sentence-transformers", "transformers", "torch", "openvino", "optimum-intel", "fastembed",
             "onnxruntime", "xllamacpp", "sie-server")  # fmt: skip
"""Packages whose versions are named in the notes of a run."""
_PRINT_VERSIONS = """
import sys
from importlib.metadata import distributions
versions = {item.name: item.version for item in distributions()}
print(", ".join(f"{name} {versions[name]}" for name in sys.argv[1:] if name in versions))
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that can be started."""

    name: str
    command: tuple[str, ...]
    """`{port}` is replaced by the port."""
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/health"


def make_contender(name: str, *, cache: Path | None = None) -> Contender:
    """Return a contender by its name.

    Args:
        name: A name of `SERVERS`.
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
    if name in PEERS:
        return _make_peer(name, PEERS[name])
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


def peer_notes(contenders: Iterable[str]) -> list[str]:
    """Return the versions in the environment of each contender of another project."""
    notes: dict[Environment, str] = {}
    for environment in (PEERS[name].environment for name in contenders if name in PEERS):
        directory = environment.directory()
        command = [str(directory / "bin" / "python"), "-c", _PRINT_VERSIONS, *_VERSIONS]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=directory)
        notes[environment] = f"environment {environment.name}: {result.stdout.strip()}"
    return list(notes.values())


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


def _make_peer(name: str, peer: Peer) -> Contender:
    model = _convert(peer.model, peer.converter or peer.environment) if peer.model else find_bundled()
    values = {"{bin}": peer.environment.directory() / "bin", "{benchmarks}": ROOT / "benchmarks", "{model}": model}
    command = list(peer.command)
    for key, value in values.items():
        command = [part.replace(key, str(value)) for part in command]
    environment = {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"}
    return Contender(name, tuple(command), environment, peer.ready_path)


def _convert(model: str, environment: Environment) -> Path:
    """Return the directory with the bundled model in another format. Convert it if it is missing."""
    directory = CACHE / "models" / model
    if not directory.exists():
        log_progress(f"converting the bundled model to {model}")
        python = environment.directory() / "bin" / "python"
        directory.mkdir(parents=True)
        command = [python, "-P", ROOT / "benchmarks" / "convert.py", model, find_bundled(), directory]
        try:
            subprocess.run(command, check=True, cwd=directory, env=clean_environment() | {"HF_HUB_OFFLINE": "1"})
        except BaseException:
            shutil.rmtree(directory)
            raise
    return directory


def free_port() -> int:
    """Return a free port below the range from which the system chooses ports of outgoing connections."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("100 ports are in use.")
