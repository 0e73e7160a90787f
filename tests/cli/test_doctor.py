"""doctor: what it finds on a machine that is fit, and on one that is not."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from emb_model_provider.cli.doctor import machine
from emb_model_provider.hubs.connectivity import check_hub
from emb_model_provider.settings.loading import load_settings
from tests.cli.running import asked, invoke
from tests.hubs.conftest import HF_REPO, MS_REPO
from tests.service import free_port

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hubs.servers import HubServer, HuggingFaceServer, ModelScopeServer


@pytest.fixture(autouse=True)
def a_free_port(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMB_PROVIDER_PORT", str(free_port()))


def checks(*, status: int = 0) -> dict[str, dict[str, Any]]:
    """Return what the doctor says, by the check's name; the worst line of each."""
    answer = asked("doctor", status=status)
    assert answer["ok"] is (status == 0)
    order = {"ok": 0, "warn": 1, "fail": 2}
    found: dict[str, dict[str, Any]] = {}
    for one in answer["checks"]:
        if one["check"] not in found or order[one["level"]] > order[found[one["check"]]["level"]]:
            found[one["check"]] = one
    return found


def test_a_fit_machine_is_told_so_and_left_as_it_was(here: Path) -> None:
    """A line for each check, exit status 0, both hubs asked; and no directory was made for looking."""
    found = checks()
    assert {"python", "packages", "processor", "memory", "cuda", "settings", "cache", "port"} <= set(found)
    assert (found["Hugging Face"]["level"], found["ModelScope"]["level"]) == ("ok", "ok")
    assert "answers" in found["ModelScope"]["found"]
    left = {path.name for path in here.iterdir()}
    assert left <= {"home"}, "where ModelScope's client keeps its session"
    assert not (here / "home" / ".cache").exists()
    text = invoke("doctor").stdout
    assert "\nok    port: localhost:" in text


@pytest.mark.parametrize(
    ("hub", "model", "name"),
    [("huggingface", HF_REPO, "Hugging Face"), ("modelscope", MS_REPO, "ModelScope")],
)
def test_a_token_that_the_hub_refuses_fails(
    hub: str,
    model: str,
    name: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says which setting holds the token, and never the token itself; the right one is good."""
    server: HubServer = request.getfixturevalue(hub)
    server.token = "right"
    prefix = "HF" if hub == "huggingface" else "MODELSCOPE"
    monkeypatch.setenv("EMB_PROVIDER_MODEL_NAME", model)
    monkeypatch.setenv("EMB_PROVIDER_MODEL_SOURCE", hub)
    monkeypatch.setenv(f"EMB_PROVIDER_{prefix}_TOKEN", "a-wrong-secret")
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "a-wrong-secret" not in result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"FAIL  {name}")]
    assert "refused" in line
    assert f"EMB_PROVIDER_{prefix}_TOKEN" in result.stdout
    monkeypatch.setenv(f"EMB_PROVIDER_{prefix}_TOKEN", "right")
    assert checks()[name]["level"] == "ok"


def test_a_hub_out_of_reach_fails_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bundled model both hubs may be away; with a model of one that is not here yet, that one fails."""
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("EMB_PROVIDER_HF_ENDPOINT", nobody)
    monkeypatch.setenv("EMB_PROVIDER_MODELSCOPE_ENDPOINT", nobody)
    found = checks()
    assert (found["Hugging Face"]["level"], found["ModelScope"]["level"]) == ("warn", "warn")
    monkeypatch.setenv("EMB_PROVIDER_MODEL_NAME", MS_REPO)
    found = checks(status=1)
    assert (found["Hugging Face"]["level"], found["ModelScope"]["level"]) == ("warn", "fail")
    assert "EMB_PROVIDER_MODELSCOPE_ENDPOINT" in found["ModelScope"]["advice"]


def test_a_hub_that_never_answers_is_given_up(huggingface: HuggingFaceServer) -> None:
    """A hub whose connections are accepted and then left alone is `silent` after the time that was given."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = load_settings(
            environ={"EMB_PROVIDER_HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        )[0]
        found = check_hub("huggingface", settings.hubs, timeout_s=0.2)
    assert (found.state, found.token) == ("silent", False)
    assert found.reason


def test_offline_asks_nobody(
    huggingface: HuggingFaceServer, modelscope: ModelScopeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so; a model that is not here fails then, for nobody will fetch it."""
    monkeypatch.setenv("EMB_PROVIDER_OFFLINE", "true")
    monkeypatch.setenv("EMB_PROVIDER_MODEL_NAME", HF_REPO)
    found = checks(status=1)
    assert huggingface.requests == modelscope.requests == []
    assert "OFFLINE" in found["hubs"]["found"]
    assert found[f"model {HF_REPO}"]["level"] == "fail"


@pytest.mark.parametrize("name", ["file/cache", "x" * 300], ids=["below a file", "too long a name"])
def test_a_cache_that_cannot_be_written_fails(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the directory and the setting, and goes on with the other checks."""
    (here / "file").touch()
    monkeypatch.setenv("EMB_PROVIDER_CACHE_DIR", str(here / name))
    found = checks(status=1)
    assert str(here / name) in found["cache"]["found"]
    assert "EMB_PROVIDER_CACHE_DIR" in found["cache"]["advice"]
    assert found["port"]["level"] == "ok"


def test_a_port_that_another_program_has_fails(
    huggingface: HuggingFaceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says which one; what listens there is asked whether it is the service, and this is none."""
    port = str(urlsplit(huggingface.url).port)
    monkeypatch.setenv("EMB_PROVIDER_HOST", "127.0.0.1")
    monkeypatch.setenv("EMB_PROVIDER_PORT", port)
    found = checks(status=1)
    assert port in found["port"]["found"]
    assert "another port" in found["port"]["advice"]


def test_a_wrong_setting_fails_and_a_misspelt_one_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without settings that can be read the checks that need them are left out."""
    monkeypatch.setenv("EMB_PROVIDER_MODEL_NAM", "x")
    found = checks()
    assert "EMB_PROVIDER_MODEL_NAME" in found["settings"]["found"]
    monkeypatch.setenv("EMB_PROVIDER_WATCHDOG_S", "soon")
    found = checks(status=1)
    assert "EMB_PROVIDER_WATCHDOG_S=soon" in found["settings"]["found"]
    assert "port" not in found


def test_models_are_told_by_what_is_on_the_disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not here, here, and a directory that is not there; each with the command that mends it."""
    mapping = {
        "pulled": {"name": HF_REPO},
        "absent": {"name": MS_REPO, "source": "modelscope"},
        "gone": {"name": "x", "path": str(here / "nowhere")},
    }
    monkeypatch.setenv("EMB_PROVIDER_MODEL_MAPPING", json.dumps(mapping))
    assert invoke("pull", "pulled", "--no-compile").exit_code == 0
    found = checks(status=1)
    assert "on this disk" in found["model pulled"]["found"]
    assert found["model absent"]["advice"].endswith("emb-provider pull absent")
    assert (found["model gone"]["level"], found["model absent"]["level"]) == ("fail", "warn")


def test_processor_and_memory_are_read_from_the_system(tmp_path: Path) -> None:
    """A container's limits count; a processor without AVX2, and too little memory, are warned of."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: Old One\nflags\t\t: sse2\n", encoding="ascii")
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal: 8000000 kB\nMemAvailable: 7000000 kB\n", encoding="ascii"
    )
    (memory,) = machine.check_memory(tmp_path)
    assert memory.level == "ok"
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("300000000\n", encoding="ascii")
    (memory,) = machine.check_memory(tmp_path)
    assert (memory.level, "a limit of 300 MB" in memory.found) == ("warn", True)
    (processor,) = machine.check_processor(tmp_path)
    assert "Old One" in processor.found
    if machine.platform.machine() == "x86_64":
        assert (processor.level, "no AVX2" in processor.found) == ("warn", True)
