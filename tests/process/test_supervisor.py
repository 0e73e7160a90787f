"""The supervisor: restarts, heartbeats, signals and exit codes of the service that it runs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from emb_model_provider.main import listen
from emb_model_provider.process.supervisor import HUNG_EXIT
from emb_model_provider.settings import ServerSettings
from tests.service import COMMAND, Service, environment, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a child inherits sockets")

PROGRAM = """
import faulthandler, json, logging, os, pathlib, sys, time
from emb_model_provider.process import supervisor

inherited = supervisor.take_inherited_state()
if inherited is None:
    logging.basicConfig(level="INFO", format="%(message)s")
    timings = supervisor.SupervisorTimings(**{"heartbeat_timeout_s": 600} | json.loads(sys.argv[1]))
    os._exit(supervisor.Supervisor([], timings).run())
print(f"previous: {inherited.previous_end}", flush=True)
ends = pathlib.Path("ends")
end, *later = json.loads(ends.read_text())
ends.write_text(json.dumps(later))
if end == "ignore signals":
    time.sleep(600)
if end == "lose heartbeat":
    faulthandler.enable()
    for _ in range(5):
        inherited.beat()
    time.sleep(600)
if end == "keep heartbeat":
    for _ in range(50):
        inherited.beat()
        time.sleep(0.1)
    os._exit(0)
if end == "print signals":
    while received := inherited.parent_pipe.recv(1):
        print(f"received: {received[0]}", flush=True)
        if received[0] == 2:
            os._exit(130)
    print("supervisor is gone", flush=True)
    os._exit(0)
if end < 0:
    os.kill(os.getpid(), -end)
os._exit(end)
"""
"""A supervised program. Each time it is started, it ends as the file `ends` says."""


class Program:
    """The program, running under its supervisor."""

    def __init__(self, directory: Path, *ends: int | str, **timings: Any) -> None:
        (directory / "ends").write_text(json.dumps(ends), encoding="utf-8")
        self._output = directory / "output"
        with self._output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(timings)],
                cwd=directory,
                env=environment(directory),
                stdout=file,
                stderr=file,
            )

    @property
    def lines(self) -> list[str]:
        return self._output.read_text(encoding="utf-8").splitlines()

    @property
    def starts(self) -> list[str]:
        """How the previous child ended, for each child."""
        return [line.removeprefix("previous: ") for line in self.lines if line.startswith("previous: ")]

    def wait_for(self, phrase: str) -> None:
        wait_until(lambda: any(phrase in line for line in self.lines))

    def wait_for_exit(self) -> int:
        return self.process.wait(120)


@pytest.mark.parametrize("code", [0, 1, 3])
def test_normal_exit_is_final(tmp_path: Path, code: int) -> None:
    """A child that exits by itself is not restarted, and the supervisor exits with its exit code."""
    program = Program(tmp_path, code)
    assert program.wait_for_exit() == code
    assert program.starts == [""]


def test_crashed_and_hung_children_are_restarted(tmp_path: Path) -> None:
    """The end of each child is logged and passed to the next. Pauses grow up to a limit while children end early."""
    kill = -signal.SIGKILL
    ends = [-signal.SIGSEGV, HUNG_EXIT, kill, kill, 0]
    program = Program(tmp_path, *ends, restart_pauses_s=[0, 0.1, 0.2])
    assert program.wait_for_exit() == 0
    reasons = [
        "was killed by SIGSEGV",
        "ended because a model hung or lost its GPU",
        *["was killed by SIGKILL (most often: not enough memory)"] * 2,
    ]
    pauses = ["at once", "in 0.1 s", "in 0.2 s", "in 0.2 s"]
    lines = [re.sub(r"after [\d.]+ s", "after N s", line) for line in program.lines]
    assert [line for line in lines if "restarting" in line] == [
        f"the service {reason} after N s, restarting it {pause}" for reason, pause in zip(reasons, pauses, strict=True)
    ]
    starts = [re.sub(r"after [\d.]+ s", "after N s", start) for start in program.starts]
    assert starts == ["", *(f"{reason} after N s" for reason in reasons)]


def test_child_that_ran_long_enough_is_restarted_at_once(tmp_path: Path) -> None:
    """Only ends soon after the start make pauses grow."""
    program = Program(tmp_path, *[-signal.SIGABRT] * 3, 0, restart_pauses_s=[0, 600], stable_after_s=0)
    assert program.wait_for_exit() == 0


@pytest.mark.slow
def test_child_without_heartbeat_is_restarted(tmp_path: Path) -> None:
    """A child whose heartbeat stops is aborted and prints its stacks. One that keeps its heartbeat is not."""
    program = Program(tmp_path, "lose heartbeat", "keep heartbeat", heartbeat_timeout_s=3)
    assert program.wait_for_exit() == 0
    assert sum("sent no heartbeat for 3 s, aborting it" in line for line in program.lines) == 1
    assert any("Fatal Python error: Aborted" in line for line in program.lines)
    assert [start.partition(" after ")[0] for start in program.starts] == ["", "was killed by SIGABRT"]


def test_shutdown_during_a_pause_starts_no_child(tmp_path: Path) -> None:
    """The supervisor exits at once, because no child is running."""
    program = Program(tmp_path, -signal.SIGABRT, -signal.SIGABRT, 0, restart_pauses_s=[0, 600])
    program.wait_for("restarting it in 600 s")
    program.process.terminate()
    assert program.wait_for_exit() == 0
    assert len(program.starts) == 2


def test_each_signal_is_forwarded_once(tmp_path: Path) -> None:
    """The second one too. The supervisor waits for the child and exits with its exit code."""
    program = Program(tmp_path, "print signals")
    program.wait_for("previous: ")
    for number in (signal.SIGTERM, signal.SIGINT):
        program.process.send_signal(number)
        program.wait_for(f"received: {int(number)}")
    assert program.wait_for_exit() == 130
    assert [line for line in program.lines if "received" in line] == ["received: 15", "received: 2"]


def test_child_that_ignores_signals_is_killed(tmp_path: Path) -> None:
    """If a second signal does not end it, the supervisor kills it."""
    program = Program(tmp_path, "ignore signals", kill_after_s=0.2)
    program.wait_for("previous: ")
    wait_until(lambda: terminate(program.process))
    assert program.wait_for_exit() == 128 + signal.SIGTERM
    program.wait_for("killing it")


def terminate(process: subprocess.Popen[bytes]) -> bool:
    """Send SIGTERM. Call it repeatedly, because two signals at the same moment count as one."""
    process.terminate()
    return process.poll() is not None


def test_child_notices_that_its_supervisor_was_killed(tmp_path: Path) -> None:
    """The parent pipe is closed, however the supervisor ends."""
    program = Program(tmp_path, "print signals")
    program.wait_for("previous: ")
    program.process.kill()
    assert program.wait_for_exit() == -signal.SIGKILL
    program.wait_for("supervisor is gone")


SMALL = """
import json, sys
from emb_model_provider import main

class Supervisor:
    def __init__(self, sockets, timings):
        pass

    def run(self):
        print(json.dumps(list(sys.modules)))
        return 0

main.Supervisor = Supervisor
sys.exit(main.main(supervise=True))
"""
"""The process of a supervisor, up to the start of the service."""


def test_supervisor_imports_no_large_library(tmp_path: Path) -> None:
    """Its process stays small, because it imports nothing that only the service needs."""
    done = subprocess.run(
        [sys.executable, "-c", SMALL], cwd=tmp_path, env=environment(tmp_path, PORT=str(free_port())),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = set(json.loads(done.stdout))
    assert "emb_model_provider.process.supervisor" in imported
    large = {
        "fastapi", "huggingface_hub", "modelscope_hub", "numpy", "openvino", "starlette", "tokenizers", "torch",
        "transformers", "uvicorn",
    }  # fmt: skip
    assert imported & large == set()


def test_port_in_use_is_reported_by_the_supervisor(tmp_path: Path) -> None:
    """The supervisor opens the sockets itself, so it starts no service and reports one line."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = {"HOST": "127.0.0.1", "PORT": str(other.getsockname()[1]), "SUPERVISE": "true"}
        done = subprocess.run(
            COMMAND, cwd=tmp_path, env=environment(tmp_path, **settings),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "another process listens on this port" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- the service itself -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory, service_cache: str) -> Iterator[Service]:
    """Yield a service under a supervisor, started by `emb-provider serve --supervise`."""
    program = "from emb_model_provider.cli.main import main; main()"
    directory = tmp_path_factory.mktemp("supervised")
    command = [sys.executable, "-c", program, "serve", "--supervise"]
    with Service(directory, command=command, CACHE_DIR=service_cache) as started:
        yield started.wait()


def embed(service: Service, host: str = "localhost") -> list[float]:
    """Return the vector of a text, requested over a new connection."""
    url = f"http://{host}:{service.port}/v1/embeddings"
    response = httpx.post(url, json={"input": "a steady stream"}, timeout=240, trust_env=False)
    assert response.status_code == 200, response.text
    vector: list[float] = response.json()["data"][0]["embedding"]
    return vector


def test_every_address_of_the_host_is_served(supervised: Service) -> None:
    """`localhost` is 127.0.0.1, and ::1 if this machine supports it."""
    sockets = listen(ServerSettings(host="localhost", port=free_port()))
    families = {listening.family for listening in sockets}
    for listening in sockets:
        listening.close()
    assert socket.AF_INET in families
    vectors = [embed(supervised, "127.0.0.1")]
    if socket.AF_INET6 in families:
        vectors.append(embed(supervised, "[::1]"))
    assert all(vector == pytest.approx(vectors[0], abs=0.01) for vector in vectors)


def test_no_connection_is_refused_during_a_restart(supervised: Service) -> None:
    """After SIGSEGV new connections wait and are answered by the next process. Both logs name the reason."""
    expected = embed(supervised)
    crashed = supervised.child
    os.kill(crashed, signal.SIGSEGV)
    with ThreadPoolExecutor(8) as pool:
        vectors = list(pool.map(lambda _: embed(supervised), range(24)))
    assert all(vector == pytest.approx(expected, abs=0.01) for vector in vectors)
    assert supervised.child != crashed
    assert "was killed by SIGSEGV after" in supervised.stderr_text()
    assert supervised.logged(logger="emb_model_provider.main", level="WARNING")[0]["message"].startswith(
        "restarted by the supervisor: the previous process was killed by SIGSEGV after"
    )
    assert supervised.log_lines(logger="emb_model_provider.process.supervisor") == [], "two processes write the file"


def test_signal_to_both_processes_counts_once(supervised: Service) -> None:
    """As sent by a terminal or a service manager: accepted requests are finished, and both processes exit with 0."""
    texts = [f"{number} " + "word " * 200 for number in range(30)]
    with ThreadPoolExecutor(2) as pool:
        requests = [pool.submit(supervised.embed, texts) for _ in range(2)]
        wait_until(lambda: supervised.figure("emb_provider_queue_inputs") > 10)
        child = supervised.child
        for process in (child, supervised.process.pid):
            os.kill(process, signal.SIGTERM)
        assert [request.result().status_code for request in requests] == [200, 200]
    assert supervised.ended() == 0
    assert "second signal" not in supervised.stderr_text()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    with pytest.raises(httpx.ConnectError):
        supervised.http.get("/health")


def test_service_shuts_down_if_its_supervisor_is_killed(tmp_path: Path, service_cache: str) -> None:
    """The service shuts down gracefully after SIGKILL to the supervisor, and the port is free."""
    settings = {"CACHE_DIR": service_cache, "SUPERVISE": "true", "PRELOAD_MODELS": "none"}
    with Service(tmp_path, **settings) as service:
        service.wait("/health")
        child = service.child
        service.signal(signal.SIGKILL)
        assert service.ended() == -signal.SIGKILL
    wait_until(lambda: not is_running(child))
    assert service.log_lines()[-1]["message"] == "stopped"
    assert service.log_lines(message="shutting down (the supervisor is gone), finishing accepted requests")
    for listening in listen(ServerSettings(host="localhost", port=service.port)):
        listening.close()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # The new parent of an orphan may collect its exit code late.
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or ") Z " not in stat.read_text(encoding="utf-8")
