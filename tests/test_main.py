"""The process: how it starts, how it ends, and what it says when it cannot start."""

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
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.service import BUNDLED, COMMAND, Service, assert_error, environment, free_port, wait_until

if TYPE_CHECKING:
    from pathlib import Path


def run(directory: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Start a service that is expected to end by itself, and return what it said."""
    return subprocess.run(
        COMMAND,
        cwd=directory,
        env=environment(directory, **{"PORT": str(free_port()), **settings}),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def assert_one_line(ended: subprocess.CompletedProcess[str], *phrases: str) -> None:
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith("error: ")
    for phrase in phrases:
        assert phrase in ended.stderr


@pytest.mark.parametrize(
    ("settings", "phrases"),
    [
        ({"PORT": "http"}, ["EMB_PROVIDER_PORT=http", "1 to 65535"]),
        ({"MODEL_PRECISION": "fp8"}, ["EMB_PROVIDER_MODEL_PRECISION=fp8", "fp32, fp16, bf16"]),
        ({"HOST": "no-such-host.invalid"}, ["EMB_PROVIDER_HOST=no-such-host.invalid", "not known"]),
        (
            {"LOG_DIR": "/proc/nowhere"},
            ["EMB_PROVIDER_LOG_DIR=/proc/nowhere", "EMB_PROVIDER_LOG_TO_FILE=false"],
        ),
    ],
)
def test_wrong_setting_is_one_line(tmp_path: Path, settings: dict[str, str], phrases: list[str]) -> None:
    """A setting that cannot be used ends the start with one line, without a traceback."""
    assert_one_line(run(tmp_path, **settings), *phrases)


def test_arguments_are_refused(tmp_path: Path) -> None:
    """`--port 8000` must not start a service on another port; `--help` says where settings come from."""
    asked = {
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
    refused, helped = asked.values()
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "EMB_PROVIDER_PORT=8000" in refused.stderr
    assert helped.returncode == 0
    assert "EMB_PROVIDER_PORT" in helped.stdout
    assert "emb-provider --help" in helped.stdout


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_port_in_use_is_one_line(tmp_path: Path, host: str) -> None:
    """Where something else listens, the start ends before any model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert_one_line(
            run(tmp_path, HOST=host, PORT=port), f"EMB_PROVIDER_PORT={port}", "something else listens there"
        )


def test_nothing_to_serve_ends_the_process(tmp_path: Path) -> None:
    """Where no model can be loaded, each says why in one line, and the process ends with a failure."""
    mapping = {"one": {"name": "one", "path": "/no/such/one"}, "two": {"name": "two", "path": "/no/such/two"}}
    ended = run(tmp_path, MODEL_MAPPING=json.dumps(mapping))
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    errors = [line for line in map(json.loads, ended.stderr.splitlines()) if line["level"] == "ERROR"]
    reasons = {line["message"].partition(" could not be loaded: ")[0] for line in errors[:2]}
    assert reasons == {"model one", "model two"}
    assert [line["message"] for line in errors[2:]] == ["no model could be loaded: stopping"]


def test_unknown_setting_is_warned_about(tmp_path: Path) -> None:
    """A misspelt name does not stop the start, and the log has the real one."""
    ended = run(tmp_path, MODEL_PAHT="/x", MODEL_NAME="x", MODEL_PATH="/no/such/directory")
    assert "did you mean EMB_PROVIDER_MODEL_PATH?" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_service_that_is_still_downloading(tmp_path: Path, number: signal.Signals) -> None:
    """A hub that never answers does not keep the process alive."""
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        endpoint = f"http://127.0.0.1:{silent_hub.getsockname()[1]}"
        settings = {"MODEL_NAME": "test/stuck", "MODEL_SOURCE": "huggingface", "HF_ENDPOINT": endpoint}
        with Service(tmp_path, **settings) as service:
            service.wait_for_state("test/stuck", "downloading")
            service.signal(number)
            assert service.ended() == 0
    assert "stopped" in service.log_text()
    assert "could not be loaded" not in service.log_text(), "it waited until the download had failed"
    assert "Traceback" not in service.stderr_text()


def test_what_outlasts_the_grace_period_is_told(tmp_path: Path) -> None:
    """Requests that are open then, sent or half sent, get 503 and the end of their connection; the exit code is 0."""
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        endpoint = f"http://127.0.0.1:{silent_hub.getsockname()[1]}"
        settings = {"MODEL_NAME": "test/stuck", "MODEL_SOURCE": "huggingface", "HF_ENDPOINT": endpoint}
        settings |= {"PRELOAD_MODELS": "none", "SHUTDOWN_GRACE_S": "0.5"}
        with Service(tmp_path, **settings) as service, ThreadPoolExecutor(1) as pool:
            service.wait("/health")
            with socket.create_connection(("localhost", service.port)) as half:
                half.sendall(
                    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
                )
                asked = pool.submit(service.embed, "x")
                service.wait_for_state("test/stuck", "downloading")
                service.signal()
                answer = asked.result()
                answered = b"".join(iter(lambda: half.recv(65536), b""))
            assert_error(answer, 503, "model_not_ready", type="server_error", param="model")
            assert answer.headers["connection"] == "close"
            assert answered.startswith(b"HTTP/1.1 503 ")
            assert b"model_not_ready" in answered
            assert service.ended() == 0
    assert "Traceback" not in service.stderr_text()


STUCK = """
import time
from emb_model_provider.process import shutdown as stopping
from emb_model_provider import main
from emb_model_provider.registry import Registry

async def stop(self):
    time.sleep(600)

Registry.stop = stop
stopping._SLACK_S = {slack_s}
main.run()
"""
"""A service whose event loop hangs as soon as it is to stop."""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(tmp_path: Path, second: signal.Signals) -> None:
    """Whatever the event loop is doing; the exit code and one line say which signal it was."""
    command = [sys.executable, "-c", STUCK.format(slack_s=600)]
    with Service(tmp_path, command=command, PRELOAD_MODELS="none", SHUTDOWN_GRACE_S="0") as service:
        service.wait("/health")
        service.signal()
        service.logged(message="SIGTERM: finishing the requests that were accepted")
        service.signal(second)
        assert service.ended() == 128 + second
    assert service.log_lines()[-1]["message"] == f"{second.name} once more: ending at once"


def test_stop_that_hangs_ends_by_itself(tmp_path: Path) -> None:
    """A while after the grace period the process ends, however stuck it is; it was not in good order, and says so."""
    command = [sys.executable, "-c", STUCK.format(slack_s=0.5)]
    with Service(tmp_path, command=command, PRELOAD_MODELS="none", SHUTDOWN_GRACE_S="0") as service:
        service.wait("/health")
        service.signal()
        assert service.ended() == 1
    assert service.log_lines()[-1]["message"] == "not stopped after 0.5 s: ending at once"


class Ended:
    """What is known of a service on a terminal that was told to stop while it had work."""

    def __init__(self) -> None:
        self.code = -1
        self.terminal = ""
        self.log = ""
        self.answers: list[httpx.Response] = []
        self.idle_connection = b"?"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Ended:
    """Start a service on a terminal, send it work, tell it to stop, and return what came of it."""
    ended = Ended()
    ours, theirs = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the terminal's other end was closed
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
        asked = [pool.submit(service.embed, texts) for _ in range(4)]
        wait_until(lambda: service.figure("emb_provider_queue_inputs") > 60)
        service.signal()
        ended.answers = [answer.result() for answer in asked]
        ended.idle_connection = idle.recv(65536)
        idle.close()
        ended.code = service.ended()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{service.url}/health", trust_env=False)
        ended.log = service.log_text()
    reader.join()
    os.close(ours)
    # Without the progress of checking the model's files, which is drawn over and over on one line.
    ended.terminal = re.sub(r"\r\x1b\[2K[^\r\n]*(\r\n)?", "", b"".join(chunks).decode())
    return ended


def test_accepted_requests_are_finished(ended: Ended) -> None:
    """SIGTERM lets what was accepted be answered, closes idle connections, and ends with 0."""
    assert [answer.status_code for answer in ended.answers] == [200] * 4
    assert all(len(answer.json()["data"]) == 60 for answer in ended.answers)
    assert ended.idle_connection == b""
    assert ended.code == 0


def test_end_is_told(ended: Ended) -> None:
    """The log tells that the stop was asked for, and its last line that it is done."""
    assert "SIGTERM: finishing the requests that were accepted" in ended.terminal
    assert ended.terminal.rstrip().endswith("stopped")


def test_lines_are_text_on_a_terminal(ended: Ended) -> None:
    """On a terminal, and then in the file too, lines are for people; what can be tried next is among them."""
    lines = ended.terminal.replace("\r\n", "\n").splitlines()
    assert [
        line
        for line in lines
        if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (INFO|WARNING|ERROR) ", line)
    ] == []
    access = [line for line in lines if "POST /v1/embeddings status=200" in line]
    assert len(access) == 4
    assert all(re.search(rf"model={BUNDLED} inputs=60 tokens=\d+ .*request_id=req_", line) for line in access)
    assert any("try it: curl http://localhost:" in line for line in lines)
    assert ended.log.splitlines() == lines


def test_path_cannot_forge_a_line(ended: Ended) -> None:
    """Line breaks and terminal escapes in a path are written as such."""
    assert r"injected\n2026-01-01 00:00:00.000 INFO    forged\x1b[31m status=404" in ended.terminal
    assert "\x1b" not in ended.terminal
