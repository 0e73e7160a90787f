"""`embed`: vectors of texts from arguments, files and pipes."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.cli.helpers import SCRIPT, invoke, phases, run
from tests.hubs.conftest import HF_REPO
from tests.service import BUNDLED, environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Compiled
    from tests.hubs.servers import HuggingFaceServer


def test_embed_prints_an_array_per_text(tmp_path: Path, service_cache: str) -> None:
    """From arguments, a file and stdin, in their order."""
    (tmp_path / "texts.txt").write_text("two\nthree\n", encoding="utf-8")
    arguments = ("embed", "one", "@texts.txt", "-", "-m", BUNDLED)
    done = run(tmp_path, *arguments, stdin="three\n\n", CACHE_DIR=service_cache)
    assert done.returncode == 0, done.stderr
    vectors = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(vector) for vector in vectors] == [384] * 5
    assert vectors[2] == pytest.approx(vectors[3], abs=1e-3)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-2)
    assert sum(value * value for value in vectors[0]) == pytest.approx(1, abs=1e-3)


def test_embed_as_json_prints_an_object_per_text(tmp_path: Path, service_cache: str) -> None:
    (vector,) = run(tmp_path, "embed", "one", CACHE_DIR=service_cache).stdout.splitlines()
    (line,) = run(tmp_path, "embed", "one", "--json", CACHE_DIR=service_cache).stdout.splitlines()
    result = json.loads(line)
    assert (result["index"], result["text"]) == (0, "one")
    assert result["embedding"] == pytest.approx(json.loads(vector), abs=1e-6)


def test_embed_without_a_text_does_not_load_a_model(here: Path, huggingface: HuggingFaceServer) -> None:
    """Stdin and the file are empty."""
    (here / "empty.txt").touch()
    result = invoke("embed", "-", "@empty.txt", "--model", HF_REPO, stdin="")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "There is no text to embed.\n")
    assert not huggingface.requests


@pytest.mark.slow
def test_embed_shows_that_it_compiles(compiled: Compiled, tmp_path: Path) -> None:
    shutil.copytree(compiled.directory / "cache" / "snapshots", tmp_path / "cache" / "snapshots")
    settings = compiled.settings | {"CACHE_DIR": str(tmp_path / "cache"), "OFFLINE": "true"}
    done = run(tmp_path, "embed", "one", "--progress", "json", **settings)
    assert done.returncode == 0, done.stderr
    assert phases(done.stderr) == ["compile", "compare", "load"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_embed_reads_the_output_of_a_command(tmp_path: Path, service_cache: str) -> None:
    """`@<(command)` is a pipe."""
    line = f'"{SCRIPT}" embed @<(echo one; echo two)'
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env=environment(tmp_path, CACHE_DIR=service_cache),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_embed_refuses_a_directory(tmp_path: Path) -> None:
    refused = invoke("embed", f"@{tmp_path}")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "no such file" in refused.stderr
