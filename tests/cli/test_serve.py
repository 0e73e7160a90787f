"""`serve` with models and options, up to the settings with which the service starts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.cli.helpers import SCRIPT, invoke
from tests.service import BUNDLED, Service

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.settings import Settings

MAPPING = {
    "gte": {"name": "iic/gte", "token": "secret", "prompts": {"query": "q: "}},
    "gte-query": {"name": "iic/gte", "token": "secret", "prompts": {"query": "q: "}, "input_type": "query"},
    "bge": {"name": "BAAI/bge", "source": "huggingface"},
}


def test_models_are_served_in_place_of_the_one_of_the_settings(
    here: Path, serving: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is the default model. .env is read, too, and options take precedence."""
    (here / ".env").write_text(
        "EMB_PROVIDER_MODEL_NAME=acme/other\nEMB_PROVIDER_MODEL_REVISION=v1\nEMB_PROVIDER_PORT=1"
    )
    monkeypatch.setenv("EMB_PROVIDER_HOST", "0.0.0.0")
    arguments = ("acme/a", "acme/b@v2", "--source", "modelscope", "--precision", "int8", "--port", "8000")
    result = invoke(
        "serve", *arguments, "--host", "localhost", "--device", "cpu", "--api-key", "one", "--api-key", "two"
    )
    assert result.exit_code == 0, result.output
    (settings,) = serving
    first, second = settings.models.specs()
    assert (first.alias, first.name, first.revision, second.name, second.revision) == (
        "acme/a", "acme/a", None, "acme/b", "v2",
    )  # fmt: skip
    assert {(spec.source, spec.precision, spec.device) for spec in (first, second)} == {("modelscope", "int8", "cpu")}
    assert settings.served_models().preload == ("acme/a", "acme/b")
    assert (settings.server.host, settings.server.port) == ("localhost", 8000)
    assert settings.server.accepted_keys == ("one", "two")


def test_alias_of_the_settings_keeps_its_values(
    here: Path, serving: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It becomes the default model, with all its aliases. The other models are loaded at their first request."""
    monkeypatch.setenv("EMB_PROVIDER_MODEL_MAPPING", json.dumps({"bge": MAPPING["bge"], **MAPPING}))
    invoke("serve", "gte-query", "--precision", "fp32")
    (settings,) = serving
    gte, bge = settings.models.specs()
    assert (gte.aliases, gte.defaults_of("gte-query").input_type) == (("gte", "gte-query"), "query")
    assert (gte.token, gte.precision, gte.prompts) == ("secret", "fp32", {"query": "q: "})
    assert (bge.name, bge.precision) == ("BAAI/bge", "auto")
    assert settings.served_models().preload == ("gte",)


def test_service_without_models_serves_those_of_the_settings(here: Path, serving: list[Settings]) -> None:
    invoke("serve", "--port", "8001")
    assert [spec.name for spec in serving[0].models.specs()] == [BUNDLED]
    assert serving[0].server.port == 8001


@pytest.mark.parametrize(
    ("arguments", "status", "phrase"),
    [
        (("./nowhere",), 2, "The directory ./nowhere does not exist"),
        (("--source", "modelscope"), 2, "require a MODEL"),
        (("a/b", "a/c", "--revision", "v1"), 2, "exactly one MODEL"),
        (("a/b@v1", "--revision", "v2"), 2, "both name a revision"),
        (("--api-key", "a,b"), 2, "comma"),
        (("--port", "0"), 2, "0"),
        (("a/b", "--device", "tpu"), 2, "Invalid value for '--device': 'tpu' is not one of auto, cpu"),
        (("a/b", "--backend", "onnx"), 2, "Invalid value for '--backend'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(
    arguments: tuple[str, ...], status: int, phrase: str, here: Path, serving: list[Settings]
) -> None:
    result = invoke("serve", *arguments)
    assert (result.exit_code, serving) == (status, [])
    assert phrase in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_command_starts_the_service(tmp_path: Path, service_cache: str) -> None:
    """With options, under a supervisor."""
    command = [str(SCRIPT), "serve", BUNDLED, "--api-key", "k1", "--supervise"]
    with Service(tmp_path, command=command, MODEL_NAME="acme/other", CACHE_DIR=service_cache) as service:
        service.wait()
        assert service.embed("hello").status_code == 401
        service.http.headers["authorization"] = "Bearer k1"
        assert service.embed("hello").json()["model"] == BUNDLED
