"""EMB_PROVIDER_SUPERVISE: what the small process does with the service that it starts."""

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

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sockets are handed to a child")

PROGRAM = """
import faulthandler, json, logging, os, pathlib, sys, time
from emb_model_provider.process import supervisor

handed = supervisor.take_inherited_state()
if handed is None:
    logging.basicConfig(level="INFO", format="%(message)s")
    constants = json.loads(sys.argv[1])
    silence_s = constants.pop("silence_s", 600)
    for name, value in constants.items():
        getattr(supervisor, name)
        setattr(supervisor, name, value)
    os._exit(supervisor.Supervisor([], silence_s).run())
print(f"after: {handed.after}", flush=True)
ends = pathlib.Path("ends")
now, *later = json.loads(ends.read_text())
ends.write_text(json.dumps(later))
if now == "deaf":
    time.sleep(600)
if now == "falls silent":
    faulthandler.enable()
    for _ in range(5):
        handed.beat()
    time.sleep(600)
if now == "beats":
    for _ in range(80):
        handed.beat()
        time.sleep(0.1)
    os._exit(0)
if now == "listen":
    while received := handed.lifeline.recv(1):
        print(f"received: {received[0]}", flush=True)
        if received[0] == 2:
            os._exit(130)
    print("alone", flush=True)
    os._exit(0)
if now < 0:
    os.kill(os.getpid(), -now)
os._exit(now)
"""
"""A supervised program that ends, each time it is started, as the file `ends` says."""


class Program:
    """That program, running under its supervisor, some of whose constants are other ones."""

    def __init__(self, directory: Path, *ends: int | str, **constants: Any) -> None:
        (directory / "ends").write_text(json.dumps(ends), encoding="utf-8")
        self._output = directory / "output"
        with self._output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(constants)],
                cwd=directory,
                env=environment(directory),
                stdout=file,
                stderr=file,
            )

    @property
    def lines(self) -> list[str]:
        return self._output.read_text(encoding="utf-8").splitlines()

    def wait_for(self, phrase: str) -> None:
        wait_until(lambda: any(phrase in line for line in self.lines))

    def ended(self) -> int:
        return self.process.wait(120)


@pytest.mark.parametrize("code", [0, 1, 3])
def test_other_ends_are_final(tmp_path: Path, code: int) -> None:
    """A child that ended by itself, well or not, is not started again: the supervisor's exit code is the child's."""
    program = Program(tmp_path, code)
    assert program.ended() == code
    assert program.lines.count("after: ") == 1


def test_dead_and_hung_children_are_started_again(tmp_path: Path) -> None:
    """Each end is told with its reason, to the next child too; pauses grow while children die young, up to a limit."""
    kill = -signal.SIGKILL
    program = Program(tmp_path, -signal.SIGSEGV, HUNG_EXIT, kill, kill, 0, _PAUSES_S=[0, 0.1, 0.2])
    assert program.ended() == 0
    reasons = [
        "was killed by SIGSEGV",
        "ended because it hung",
        *["was killed by SIGKILL (most often: not enough memory)"] * 2,
    ]
    lines = [re.sub(r"after [\d.]+ s", "after N s", line) for line in program.lines]
    pauses = ["at once", "in 0.1 s", "in 0.2 s", "in 0.2 s"]
    assert [line for line in lines if "again" in line] == [
        f"the service {reason} after N s: it is started again {pause}"
        for reason, pause in zip(reasons, pauses, strict=True)
    ]
    told = [line for line in lines if line.startswith("after: ")]
    assert told == ["after: ", *(f"after: {reason} after N s" for reason in reasons)]


def test_child_that_lived_long_enough_is_replaced_without_a_pause(tmp_path: Path) -> None:
    """Only deaths soon after the start make pauses grow."""
    program = Program(tmp_path, *[-signal.SIGABRT] * 3, 0, _PAUSES_S=[0, 600], _SETTLED_S=0)
    assert program.ended() == 0


def test_child_that_falls_silent_is_replaced(tmp_path: Path) -> None:
    """One that showed signs of life and then none is aborted, with its stacks told; one that beats on is left alone."""
    program = Program(tmp_path, "falls silent", "beats", silence_s=5)
    assert program.ended() == 0
    assert sum("gave no sign of life for 5 s: it is aborted" in line for line in program.lines) == 1
    assert any("Fatal Python error: Aborted" in line for line in program.lines)
    told = [line.partition(" after ")[0] for line in program.lines if line.startswith("after: ")]
    assert told == ["after: ", "after: was killed by SIGABRT"]


def test_stop_during_a_pause_is_the_end(tmp_path: Path) -> None:
    """Nothing runs then, and nothing is started any more."""
    program = Program(tmp_path, -signal.SIGABRT, -signal.SIGABRT, 0, _PAUSES_S=[0, 600])
    program.wait_for("started again in 600 s")
    program.process.terminate()
    assert program.ended() == 0
    assert sum(line.startswith("after: ") for line in program.lines) == 2


def test_signals_are_passed_on_once_each(tmp_path: Path) -> None:
    """A second one too; the supervisor waits for the child, and ends with its exit code."""
    program = Program(tmp_path, "listen")
    program.wait_for("after: ")
    for number in (signal.SIGTERM, signal.SIGINT):
        program.process.send_signal(number)
        program.wait_for(f"received: {int(number)}")
    assert program.ended() == 130
    assert [line for line in program.lines if "received" in line] == ["received: 15", "received: 2"]


def test_child_that_hears_nothing_is_killed(tmp_path: Path) -> None:
    """A second signal ends it at once, or else the supervisor does."""
    program = Program(tmp_path, "deaf", _KILL_AFTER_S=0.2)
    program.wait_for("after: ")
    wait_until(lambda: _terminated(program.process))
    assert program.ended() == 128 + signal.SIGTERM
    program.wait_for("it is killed")


def _terminated(process: subprocess.Popen[bytes]) -> bool:
    """Send the signal again and again: two that come at one moment are one."""
    process.terminate()
    return process.poll() is not None


def test_child_of_a_killed_supervisor_knows(tmp_path: Path) -> None:
    """However the supervisor ends, the child is told."""
    program = Program(tmp_path, "listen")
    program.wait_for("after: ")
    program.process.kill()
    assert program.ended() == -signal.SIGKILL
    program.wait_for("alone")


def test_supervisor_is_small() -> None:
    """What only the service needs is not imported."""
    code = "import json, sys, emb_model_provider.main; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"numpy", "openvino", "tokenizers", "torch", "fastapi", "starlette", "uvicorn", "huggingface_hub"}
    assert not heavy & set(json.loads(done.stdout))


def test_port_in_use_is_said_once(tmp_path: Path) -> None:
    """The supervisor finds out by itself: nothing is started."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = {"HOST": "127.0.0.1", "PORT": str(other.getsockname()[1]), "SUPERVISE": "true"}
        done = subprocess.run(
            COMMAND, cwd=tmp_path, env=environment(tmp_path, **settings),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "something else listens there" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- the service itself -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory, service_cache: str) -> Iterator[Service]:
    """Yield a service under a supervisor, started by the command's own flag."""
    program = "from emb_model_provider.cli.main import main; main()"
    directory = tmp_path_factory.mktemp("supervised")
    command = [sys.executable, "-c", program, "serve", "--supervise"]
    with Service(directory, command=command, CACHE_DIR=service_cache) as started:
        yield started.wait()


def ask(service: Service, host: str = "localhost") -> list[float]:
    """Return the vector of a text, asked over a connection of its own."""
    url = f"http://{host}:{service.port}/v1/embeddings"
    answer = httpx.post(url, json={"input": "a steady stream"}, timeout=240, trust_env=False)
    assert answer.status_code == 200, answer.text
    vector: list[float] = answer.json()["data"][0]["embedding"]
    return vector


def test_every_address_of_the_host_is_served(supervised: Service) -> None:
    """`localhost` is 127.0.0.1, and ::1 where this machine has it."""
    sockets = listen(ServerSettings(host="localhost", port=free_port()))
    families = {one.family for one in sockets}
    for one in sockets:
        one.close()
    assert socket.AF_INET in families
    vectors = [ask(supervised, "127.0.0.1")]
    if socket.AF_INET6 in families:
        vectors.append(ask(supervised, "[::1]"))
    assert all(vector == pytest.approx(vectors[0], abs=0.01) for vector in vectors)


def test_no_connection_is_refused_while_a_crashed_service_comes_back(supervised: Service) -> None:
    """After SIGSEGV new connections wait, and are answered right by the next process; both logs say why."""
    expected = ask(supervised)
    crashed = supervised.child
    os.kill(crashed, signal.SIGSEGV)
    with ThreadPoolExecutor(8) as pool:
        vectors = list(pool.map(lambda _: ask(supervised), range(24)))
    assert all(vector == pytest.approx(expected, abs=0.01) for vector in vectors)
    assert supervised.child != crashed
    assert "was killed by SIGSEGV after" in supervised.stderr_text()
    assert supervised.logged(logger="emb_model_provider.main", level="WARNING")[0]["message"].startswith(
        "started again by the supervisor: the service before was killed by SIGSEGV after"
    )
    assert supervised.log_lines(logger="emb_model_provider.process.supervisor") == [], (
        "the file has two writers"
    )


def test_signal_to_both_processes_is_one(supervised: Service) -> None:
    """As from a terminal or a service manager: what was accepted is finished, and both are gone, with 0."""
    texts = [f"{number} " + "word " * 200 for number in range(30)]
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(supervised.embed, texts) for _ in range(2)]
        wait_until(lambda: supervised.figure("emb_provider_queue_inputs") > 10)
        child = supervised.child
        for process in (child, supervised.process.pid):
            os.kill(process, signal.SIGTERM)
        assert [answer.result().status_code for answer in asked] == [200, 200]
    assert supervised.ended() == 0
    assert "once more" not in supervised.stderr_text()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    with pytest.raises(httpx.ConnectError):
        supervised.http.get("/health")


def test_killed_supervisor_leaves_nothing_behind(tmp_path: Path, service_cache: str) -> None:
    """SIGKILL to it is the end of the service too, in good order; the port is free again."""
    settings = {"CACHE_DIR": service_cache, "SUPERVISE": "true", "PRELOAD_MODELS": "none"}
    with Service(tmp_path, **settings) as service:
        service.wait("/health")
        child = service.child
        service.signal(signal.SIGKILL)
        assert service.ended() == -signal.SIGKILL
    wait_until(lambda: not _is_there(child))
    assert service.log_lines()[-1]["message"] == "stopped"
    assert service.log_lines(message="the supervisor is gone: finishing the requests that were accepted")
    for one in listen(ServerSettings(host="localhost", port=service.port)):
        one.close()


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # An orphan's new parent may take its time to ask for its exit code.
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or ") Z " not in stat.read_text(encoding="utf-8")
