"""The process of the service: errors at startup, shutdown, and its log lines on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from emb_model_provider.errors import SettingsError
from emb_model_provider.main import listen
from emb_model_provider.settings import ServerSettings
from tests.service import BUNDLED, COMMAND, Service, assert_error, environment, free_port, wait_until


def run(directory: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a service that is expected to end by itself."""
    return subprocess.run(
        COMMAND,
        cwd=directory,
        env=environment(directory, **{"PORT": str(free_port()), **settings}),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *phrases: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    for phrase in phrases:
        assert phrase in done.stderr


@pytest.mark.parametrize(
    ("settings", "phrases"),
    [
        ({"PORT": "http"}, ["EMB_PROVIDER_PORT=http", "1 to 65535"]),
        ({"MODEL_PRECISION": "fp8"}, ["EMB_PROVIDER_MODEL_PRECISION=fp8", "fp32, fp16, bf16"]),
        ({"HOST": "no-such-host.invalid"}, ["EMB_PROVIDER_HOST=no-such-host.invalid", "cannot be resolved"]),
        ({"LOG_DIR": "/proc/nowhere"}, ["EMB_PROVIDER_LOG_DIR=/proc/nowhere", "EMB_PROVIDER_LOG_TO_FILE=false"]),
    ],
)
def test_invalid_setting_is_reported_in_one_line(tmp_path: Path, settings: dict[str, str], phrases: list[str]) -> None:
    """The process exits with one line and no traceback."""
    assert_one_line(run(tmp_path, **settings), *phrases)


def test_all_wrong_settings_are_reported(tmp_path: Path) -> None:
    """One line each."""
    done = run(tmp_path, PORT="http", MODEL_PRECISION="fp8")
    assert [line.partition("=")[0] for line in done.stderr.splitlines()] == [
        "error: EMB_PROVIDER_MODEL_PRECISION",
        "error: EMB_PROVIDER_PORT",
    ]


def test_arguments_are_rejected(tmp_path: Path) -> None:
    """`--port 8000` does not start a service on another port. `--help` explains the settings."""
    results = {
        argument: subprocess.run(
            [*COMMAND, *argument.split()],
            cwd=tmp_path,
            env=environment(tmp_path, PORT="http"),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        for argument in ("--port 8000", "--help")
    }
    rejected, helped = results.values()
    assert rejected.returncode == 2
    assert rejected.stderr.count("\n") == 1
    assert "EMB_PROVIDER_PORT=8000" in rejected.stderr
    assert helped.returncode == 0
    assert "EMB_PROVIDER_PORT" in helped.stdout
    assert "emb-provider --help" in helped.stdout


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_port_in_use_is_reported_in_one_line(tmp_path: Path, host: str) -> None:
    """If another process listens on the port, the process exits before it loads a model."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert_one_line(
            run(tmp_path, HOST=host, PORT=port), f"EMB_PROVIDER_PORT={port}", "another process listens on this port"
        )


@pytest.mark.parametrize(
    ("host", "families"),
    [("::", "46"), ("[::]", "46"), ("*", "46"), ("0.0.0.0", "4"), ("127.0.0.1, ::1", "46"), ("[::1]", "6"),
     ("0.0.0.0,127.0.0.1,127.0.0.2", "4"), ("::,0.0.0.0,localhost", "46")],
)  # fmt: skip
@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_addresses_that_the_service_listens_on(host: str, families: str) -> None:
    """`::` and `*` include IPv4, so that the container's health check works, and a list can repeat addresses."""
    port = free_port()
    sockets = listen(ServerSettings(host=host, port=port))
    try:
        reached = ""
        for family, address in (("4", "127.0.0.1"), ("6", "::1")):
            with suppress(ConnectionRefusedError), socket.create_connection((address, port), timeout=10):
                reached += family
        assert reached == families
    finally:
        for listening in sockets:
            listening.close()


@pytest.mark.parametrize(
    "host", ["127.0.0.1,192.0.2.1", "127.0.0.1,no-such-host.invalid", "http://localhost", "x" * 70]
)
def test_host_that_cannot_be_used_is_named(host: str) -> None:
    """Each host of a list has to be an address of this machine."""
    with pytest.raises(SettingsError, match=re.escape(host.rpartition(",")[2])) as caught:
        listen(ServerSettings(host=host, port=free_port()))
    assert str(caught.value).startswith(f"EMB_PROVIDER_HOST={host}, EMB_PROVIDER_PORT=")


def test_process_exits_if_no_model_can_be_loaded(tmp_path: Path) -> None:
    """The reason of each model is logged in one line, and the exit code is 1."""
    mapping = {"one": {"name": "one", "path": "/no/such/one"}, "two": {"name": "two", "path": "/no/such/two"}}
    done = run(tmp_path, MODEL_MAPPING=json.dumps(mapping))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in map(json.loads, done.stderr.splitlines()) if line["level"] == "ERROR"]
    reasons = {line["message"].partition(" could not be loaded: ")[0] for line in errors[:2]}
    assert reasons == {"model one", "model two"}
    (last,) = [line["message"] for line in errors[2:]]
    assert last.startswith("no model could be loaded")


def test_value_of_env_file_that_is_not_used_is_reported(tmp_path: Path) -> None:
    """An image sets EMB_PROVIDER_PORT, which takes precedence over the file that its user mounts."""
    (tmp_path / ".env").write_text("EMB_PROVIDER_PORT=1\nEMB_PROVIDER_LOG_LEVEL=INFO\n")
    done = run(tmp_path, MODEL_PATH="/no/such/model", LOG_LEVEL="INFO")
    message = "EMB_PROVIDER_PORT: the value in .env is not used, because the environment has another one"
    assert message in [json.loads(line)["message"] for line in done.stderr.splitlines()]


def test_unknown_setting_is_reported(tmp_path: Path) -> None:
    """A misspelled name does not prevent the start, and the log suggests the correct one."""
    done = run(tmp_path, MODEL_PAHT="/x", MODEL_NAME="x", MODEL_PATH="/no/such/directory")
    assert "did you mean EMB_PROVIDER_MODEL_PATH?" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_service_that_is_downloading(tmp_path: Path, number: signal.Signals) -> None:
    """A hub that does not answer does not delay the end of the process."""
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        endpoint = f"http://127.0.0.1:{silent_hub.getsockname()[1]}"
        settings = {"MODEL_NAME": "test/stuck", "MODEL_SOURCE": "huggingface", "HF_ENDPOINT": endpoint}
        with Service(tmp_path, **settings) as service:
            service.wait_for_state("test/stuck", "downloading")
            service.signal(number)
            assert service.ended() == 0
    assert "stopped" in service.log_text()
    assert "could not be loaded" not in service.log_text(), "it waited for the download to fail"
    assert "Traceback" not in service.stderr_text()


def test_requests_fail_after_the_grace_period(tmp_path: Path) -> None:
    """Open requests, complete or not, get 503, and their connections are closed. The exit code is 0."""
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        endpoint = f"http://127.0.0.1:{silent_hub.getsockname()[1]}"
        settings = {"MODEL_NAME": "test/stuck", "MODEL_SOURCE": "huggingface", "HF_ENDPOINT": endpoint}
        settings |= {"PRELOAD_MODELS": "none", "SHUTDOWN_GRACE_S": "0.5"}
        with Service(tmp_path, **settings) as service, ThreadPoolExecutor(1) as pool:
            service.wait("/health")
            with socket.create_connection(("localhost", service.port)) as incomplete:
                incomplete.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
                request = pool.submit(service.embed, "x")
                service.wait_for_state("test/stuck", "downloading")
                service.signal()
                response = request.result()
                received = b"".join(iter(lambda: incomplete.recv(65536), b""))
            assert_error(response, 503, "model_not_ready", type="server_error", param="model")
            assert response.headers["connection"] == "close"
            assert received.startswith(b"HTTP/1.1 503 ")
            assert b"model_not_ready" in received
            assert service.ended() == 0
    assert "Traceback" not in service.stderr_text()


STUCK = """
import functools, time
from emb_model_provider import main
from emb_model_provider.registry import Registry

async def stop(self):
    time.sleep(600)

Registry.stop = stop
main.ShutdownSignal = functools.partial(main.ShutdownSignal, slack_s={slack_s})
main.run()
"""
"""A service whose event loop hangs during the shutdown."""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_process_at_once(tmp_path: Path, second: signal.Signals) -> None:
    """It does so even if the event loop hangs. The exit code and a log line name the signal."""
    command = [sys.executable, "-c", STUCK.format(slack_s=600)]
    with Service(tmp_path, command=command, PRELOAD_MODELS="none", SHUTDOWN_GRACE_S="0") as service:
        service.wait("/health")
        service.signal()
        service.logged(message="shutting down (SIGTERM), finishing accepted requests")
        service.signal(second)
        assert service.ended() == 128 + second
    assert service.log_lines()[-1]["message"] == f"second signal ({second.name}), exiting immediately"


def test_shutdown_that_hangs_ends_the_process(tmp_path: Path) -> None:
    """Some time after the grace period the process exits with 1 and a log line."""
    command = [sys.executable, "-c", STUCK.format(slack_s=0.5)]
    with Service(tmp_path, command=command, PRELOAD_MODELS="none", SHUTDOWN_GRACE_S="0") as service:
        service.wait("/health")
        service.signal()
        assert service.ended() == 1
    last = service.log_lines()[-1]["message"]
    assert last == "shutdown did not finish within 0.5 s, exiting immediately"


class Shutdown:
    """What was observed of a service on a terminal that was shut down while it had requests."""

    def __init__(self) -> None:
        self.code = -1
        self.terminal = ""
        self.log = ""
        self.responses: list[httpx.Response] = []
        self.idle_connection = b"?"


@pytest.fixture(scope="module")
def shutdown(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Shutdown:
    """Run a service on a terminal, and shut it down while it has requests."""
    shutdown = Shutdown()
    ours, theirs = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the other end of the terminal was closed
            while chunk := os.read(ours, 65536):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    directory = tmp_path_factory.mktemp("terminal")
    settings = {"CACHE_DIR": service_cache, "BACKEND": backend}
    with Service(directory, stderr=theirs, **settings) as service, ThreadPoolExecutor(4) as pool:
        os.close(theirs)
        service.wait()
        service.http.get("/v1/models/injected%0A2026-01-01 00:00:00.000 INFO    forged%1b[31m")
        idle = socket.create_connection(("localhost", service.port))
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: b"ok" in idle.recv(65536))
        texts = [f"{number} " + "word " * 200 for number in range(60)]
        requests = [pool.submit(service.embed, texts) for _ in range(4)]
        wait_until(lambda: service.figure("emb_provider_queue_inputs") > 60)
        service.signal()
        shutdown.responses = [request.result() for request in requests]
        shutdown.idle_connection = idle.recv(65536)
        idle.close()
        shutdown.code = service.ended()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{service.url}/health", trust_env=False)
        shutdown.log = service.log_text()
    reader.join()
    os.close(ours)
    shutdown.terminal = b"".join(chunks).decode()
    return shutdown


def test_accepted_requests_are_finished(shutdown: Shutdown) -> None:
    """After SIGTERM accepted requests are answered, idle connections are closed, and the exit code is 0."""
    assert [response.status_code for response in shutdown.responses] == [200] * 4
    assert all(len(response.json()["data"]) == 60 for response in shutdown.responses)
    assert shutdown.idle_connection == b""
    assert shutdown.code == 0


def test_shutdown_is_logged(shutdown: Shutdown) -> None:
    """The log has a line for the start of the shutdown, and its last line is the end."""
    assert "shutting down (SIGTERM), finishing accepted requests" in shutdown.terminal
    assert shutdown.terminal.rstrip().endswith("stopped")


def test_lines_on_a_terminal_are_text(shutdown: Shutdown) -> None:
    """On a terminal, and then in the file too, lines are text. One of them is a command to try."""
    lines = shutdown.terminal.replace("\r\n", "\n").splitlines()
    assert [
        line for line in lines if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (INFO|WARNING|ERROR) ", line)
    ] == []
    access = [line for line in lines if "POST /v1/embeddings status=200" in line]
    assert len(access) == 4
    assert all(re.search(rf"model={BUNDLED} inputs=60 tokens=\d+ .*request_id=req_", line) for line in access)
    assert any("try it: curl http://localhost:" in line for line in lines)
    (ready,) = [line for line in lines if f"model {BUNDLED} is ready: 384-dim " in line]
    assert len(ready) <= 120
    assert shutdown.log.splitlines() == lines


def test_path_cannot_forge_a_line(shutdown: Shutdown) -> None:
    """Line breaks and terminal escapes in a path are escaped."""
    assert r"injected\n2026-01-01 00:00:00.000 INFO    forged\x1b[31m status=404" in shutdown.terminal
    assert "\x1b" not in shutdown.terminal
