"""The doctor as a whole, and its check of the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.cli.helpers import invoke, run_doctor

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_a_machine_without_problems(here: Path) -> None:
    """The exit code is 0, and both hubs were asked. No directory is created."""
    results = run_doctor()
    assert {"python", "packages", "processor", "memory", "cuda", "settings", "cache", "port"} <= set(results)
    assert (results["Hugging Face"]["level"], results["ModelScope"]["level"]) == ("ok", "ok")
    assert "answers" in results["ModelScope"]["found"]
    created = {path.name for path in here.iterdir()}
    assert created <= {"home"}, "ModelScope's client keeps its session there"
    assert not (here / "home" / ".cache").exists()


def test_the_text_has_a_line_per_check(port: int) -> None:
    """Problems have their advice below them."""
    lines = invoke("doctor").stdout.splitlines()
    assert f"ok    port: localhost:{port} is free" in lines
    model = next(line for line in lines if ": bundled, not compiled yet" in line)
    assert model.startswith("warn  model ")
    assert lines[lines.index(model) + 1].startswith("      The first start compiles it.")


def test_an_unknown_setting_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMB_PROVIDER_MODEL_NAM", "x")
    setting = run_doctor()["settings"]
    assert setting["level"] == "warn"
    assert "EMB_PROVIDER_MODEL_NAME" in setting["found"]


def test_an_invalid_setting_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks that need the settings are skipped."""
    monkeypatch.setenv("EMB_PROVIDER_WATCHDOG_S", "soon")
    results = run_doctor(status=1)
    assert "EMB_PROVIDER_WATCHDOG_S=soon" in results["settings"]["found"]
    assert "port" not in results
