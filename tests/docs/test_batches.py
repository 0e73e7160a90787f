"""The commands of docs/batches.md run unchanged, one after the other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.docs.markdown import ROOT, blocks
from tests.service import environment

if TYPE_CHECKING:
    from tests.service import Service


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_commands(service: Service, service_cache: str, tmp_path: Path) -> None:
    """The command line writes the results, and curl uploads the same file."""
    run, curl = (block.text for block in blocks(ROOT / "docs" / "batches.md") if block.mark == "script")
    variables = environment(tmp_path, CACHE_DIR=service_cache, PORT=str(service.port)) | {"NO_PROXY": "localhost"}
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"

    def execute(script: str) -> str:
        script = script.replace("localhost:9000", f"localhost:{service.port}")
        command = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = execute(run)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [result["custom_id"] for result in results] == ["1", "2"]
    assert {len(result["response"]["body"]["data"][0]["embedding"]) for result in results} == {384}
    uploaded, files, batches = json_values(execute(curl))
    assert uploaded["bytes"] == (tmp_path / "requests.jsonl").stat().st_size
    assert files["data"][0] == uploaded
    assert batches["data"][0]["id"] in printed


def json_values(text: str) -> list[dict[str, object]]:
    """Return the JSON values that are written one after the other."""
    decoder, values = json.JSONDecoder(), []
    while text:
        value, end = decoder.raw_decode(text)
        values.append(value)
        text = text[end:].lstrip()
    return values
