"""`emb-provider batches` with the real service."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.helpers import invoke, invoke_json, run, start
from tests.service import Service, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cli.conftest import Compiled

pytestmark = pytest.mark.slow

KEY = "key-of-search"


def request(custom_id: str, model: str = "small", **body: Any) -> dict[str, Any]:
    fields = {"model": model, "input": "hello", **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": fields}


@pytest.fixture(scope="module")
def service(compiled: Compiled) -> Iterator[Service]:
    """Yield a service with keys, and with a model that cannot be loaded."""
    mapping = json.loads(compiled.settings["MODEL_MAPPING"])
    mapping["broken"] = {"name": "broken", "path": str(compiled.directory / "not-there")}
    settings = compiled.settings | {
        "MODEL_MAPPING": json.dumps(mapping),
        "PRELOAD_MODELS": "small",
        "API_KEYS": f"{KEY},another",
        "ADMIN_API_KEYS": "of-an-administrator",
    }
    with Service(compiled.directory / "batches", **settings) as started:
        yield started.wait()


@pytest.fixture
def ours(service: Service, here: object, monkeypatch: pytest.MonkeyPatch) -> Service:
    """Set port and keys of the service in the settings of this process."""
    monkeypatch.setenv("EMB_PROVIDER_PORT", str(service.port))
    monkeypatch.setenv("EMB_PROVIDER_API_KEYS", f"{KEY},another")
    monkeypatch.setenv("EMB_PROVIDER_ADMIN_API_KEYS", "of-an-administrator")
    return service


@pytest.fixture
def file(here: Path) -> Path:
    return here / "requests.jsonl"


def write(file: Path, *requests: dict[str, Any]) -> None:
    file.write_text("".join(json.dumps(each) + "\n" for each in requests), encoding="utf-8")


def test_a_file_is_answered(ours: Service, file: Path, here: Path) -> None:
    """The batch can then be listed and shown. An error is in a file of its own, and in the exit code."""
    write(file, request("1"), request("2", input=["hello", "world"]))
    result = invoke("batches", "run", str(file), "--out", "results.jsonl", "--progress", "plain")
    assert result.exit_code == 0, result.output
    assert "wrote results.jsonl" in result.stderr
    assert "upload" in result.stderr
    lines = [json.loads(line) for line in (here / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["custom_id"] for line in lines] == ["1", "2"]
    assert {path.name for path in here.glob("results*")} == {"results.jsonl"}

    write(file, request("1"), request("too large", dimensions=5000))
    failed = invoke_json("batches", "run", str(file), "--out", "results.jsonl", status=1)
    assert failed["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    (error,) = (here / "results.errors.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(error)["response"]["body"]["error"]["code"] == "invalid_dimensions"

    listed = invoke_json("batches", "list", "--limit", "1")
    assert listed == [failed]
    head, line, *_ = invoke("batches", "list").stdout.splitlines()
    assert head.split() == ["BATCH", "STATUS", "ENDPOINT", "REQUESTS", "FAILED", "CREATED"]
    assert line.split()[:7] == [failed["id"], "completed", "/v1/embeddings", "2", "of", "2", "1"]
    assert invoke("batches", "list", "-q").stdout.splitlines()[0] == failed["id"]
    shown = invoke("batches", "show", failed["id"]).stdout
    assert shown.startswith(f"{failed['id']}: completed\n")
    assert "2 of 2 requests, 100 %, 1 failed" in shown
    assert failed["error_file_id"] in shown


def test_an_invalid_file_is_explained(ours: Service, file: Path, here: Path) -> None:
    """With the number of the line, and exit code 2. So are files that are not uploaded."""
    write(file, request("1"), request("1"), request("3", model="nope"))
    result = invoke("batches", "run", str(file), "--out", "results.jsonl")
    assert result.exit_code == 2
    assert "was not started" in result.stderr
    assert "line 2: The custom_id '1' is a duplicate" in result.stderr
    assert "line 3: The model `nope` does not exist" in result.stderr
    assert not (here / "results.jsonl").exists()

    file.write_text("hello\n", encoding="utf-8")
    result = invoke("batches", "run", str(file), "--out", "results.jsonl")
    assert (result.exit_code, "is not a request like" in result.stderr) == (2, True)
    assert invoke("batches", "run", "missing.jsonl", "--out", "results.jsonl").exit_code == 2


def test_an_interrupted_command_leaves_the_batch(ours: Service, compiled: Compiled, file: Path) -> None:
    """It says how to see the batch, which can be cancelled once."""
    write(file, request("1", model="broken"))
    settings = {"PORT": str(ours.port), "API_KEYS": KEY}
    arguments = ("batches", "run", str(file), "--out", "results.jsonl", "--progress", "plain")
    with start(file.parent, *arguments, **settings) as process:
        wait_until(lambda: process.poll() is not None or invoke_json("batches", "list")[0]["pause_reason"])
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "the batch continues. To see it: emb-provider batches list" in stderr
    (batch,) = (each for each in invoke_json("batches", "list") if each["status"] == "in_progress")
    assert "paused: The model `broken` could not be loaded" in invoke("batches", "show", batch["id"]).stdout
    assert invoke("batches", "cancel", batch["id"]).stdout.startswith(f"{batch['id']}: cancelling\n")
    wait_until(lambda: invoke_json("batches", "show", batch["id"])["status"] == "cancelled")
    again = invoke_json("batches", "cancel", batch["id"], status=2)
    assert again["error"]["code"] == "state_conflict"
    assert invoke_json("batches", "show", "batch_x", status=2)["error"]["code"] == "batch_not_found"


def test_without_a_server(here: Path) -> None:
    done = run(here, "batches", "list", "--json", PORT="1")
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (3, "server_unreachable")
