"""The doctor's checks of the port, the hubs and the models."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from emb_model_provider.hubs.base import check_hub
from emb_model_provider.settings.loading import load_settings
from tests.cli.helpers import invoke, pull_files, run_doctor
from tests.hubs.conftest import HF_REPO, MS_REPO
from tests.service import free_port

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hubs.servers import HubServer, HuggingFaceServer, ModelScopeServer


# --- port ---------------------------------------------------------------------------------------------


def test_a_port_in_use_by_another_program_fails(
    huggingface: HuggingFaceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = str(urlsplit(huggingface.url).port)
    monkeypatch.setenv("EMB_PROVIDER_HOST", "127.0.0.1")
    monkeypatch.setenv("EMB_PROVIDER_PORT", port)
    result = run_doctor(status=1)["port"]
    assert result["found"] == f"127.0.0.1:{port} is not available"
    assert f"EMB_PROVIDER_PORT={port}" in result["advice"]


# --- hubs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hub", "model", "name"), [("huggingface", HF_REPO, "Hugging Face"), ("modelscope", MS_REPO, "ModelScope")]
)
def test_a_token_that_the_hub_rejects_fails(
    hub: str, model: str, name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice names the setting. The token itself is never printed."""
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
    assert "the token is rejected" in line
    assert f"EMB_PROVIDER_{prefix}_TOKEN" in result.stdout
    monkeypatch.setenv(f"EMB_PROVIDER_{prefix}_TOKEN", "right")
    assert run_doctor()[name]["level"] == "ok"


def test_a_hub_that_cannot_be_reached_fails_only_if_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model needs no hub. A model that is not on disk needs its own."""
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("EMB_PROVIDER_HF_ENDPOINT", url)
    monkeypatch.setenv("EMB_PROVIDER_MODELSCOPE_ENDPOINT", url)
    results = run_doctor()
    assert (results["Hugging Face"]["level"], results["ModelScope"]["level"]) == ("warn", "warn")
    monkeypatch.setenv("EMB_PROVIDER_MODEL_NAME", MS_REPO)
    results = run_doctor(status=1)
    assert (results["Hugging Face"]["level"], results["ModelScope"]["level"]) == ("warn", "fail")
    assert "EMB_PROVIDER_MODELSCOPE_ENDPOINT" in results["ModelScope"]["advice"]


def test_the_check_of_a_hub_has_a_time_limit() -> None:
    """A hub can accept connections and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings, _ = load_settings(environ={"EMB_PROVIDER_HF_ENDPOINT": url})
        status = check_hub("huggingface", settings.hubs, timeout_s=0.2)
    assert (status.state, status.token) == ("silent", False)
    assert status.reason


def test_offline_sends_no_requests(
    huggingface: HuggingFaceServer, modelscope: ModelScopeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is not on disk fails then, because it will not be downloaded."""
    monkeypatch.setenv("EMB_PROVIDER_OFFLINE", "true")
    monkeypatch.setenv("EMB_PROVIDER_MODEL_NAME", HF_REPO)
    results = run_doctor(status=1)
    assert huggingface.requests == modelscope.requests == []
    assert "OFFLINE" in results["hubs"]["found"]
    assert results[f"model {HF_REPO}"]["level"] == "fail"


# --- models -------------------------------------------------------------------------------------------


def test_models_on_disk_and_missing_models(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing model is a warning with the command that downloads it. A missing directory is a failure."""
    mapping = {
        "pulled": {"name": HF_REPO},
        "absent": {"name": MS_REPO, "source": "modelscope"},
        "gone": {"name": "x", "path": str(here / "nowhere")},
    }
    monkeypatch.setenv("EMB_PROVIDER_MODEL_MAPPING", json.dumps(mapping))
    pull_files("pulled")
    results = run_doctor(status=1)
    assert results["model pulled"]["found"] == "on disk, not compiled yet"
    assert results["model absent"]["level"] == "warn"
    assert results["model absent"]["advice"].endswith("emb-provider pull absent")
    assert results["model gone"]["level"] == "fail"
    assert str(here / "nowhere") in results["model gone"]["found"]
