"""`tune`: the fastest options of a compiled model, measured on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.cli.helpers import run

if TYPE_CHECKING:
    from tests.cli.conftest import Compiled


@pytest.mark.slow
def test_trials_are_printed_and_the_options_kept(compiled: Compiled) -> None:
    """As JSON and as a table."""
    printed = run(compiled.directory, "tune", "small", "--seconds", "20", "--json", **compiled.settings)
    assert printed.returncode == 0, printed.stderr
    values = json.loads(printed.stdout)
    assert values["model"] == "small"
    assert set(values["tuning"]) == {"fused_attention", "fused_attention_alone", "streams", "int8_gain"}
    first = values["trials"][0]
    assert first["tuning"]["fused_attention"] is False
    assert all(ratio > 0 for ratio in first["ratios"].values())
    # Other tests compile the same model at other precisions.
    manifests = (compiled.directory / "cache" / "artifacts").glob("*/manifest.json")
    kept = [tuning for each in manifests for tuning in json.loads(each.read_text())["tunings"].values()]
    assert values["tuning"] in kept
    table = run(compiled.directory, "tune", "small", "--seconds", "20", **compiled.settings).stdout
    assert table.splitlines()[0].split() == ["options", "inputs", "×", "tokens:", "relative", "speed", "all", "kept"]
    assert "fused_attention=false" in table


def test_a_model_of_torch_has_nothing_to_tune(compiled: Compiled) -> None:
    failed = run(compiled.directory, "tune", "small", **(compiled.settings | {"BACKEND": "torch"}))
    assert failed.returncode != 0
    assert "nothing to tune" in failed.stderr
