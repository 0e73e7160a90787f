"""embed, and pull with compiling: a small real model, from a hub of this machine to vectors on stdout."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.cli.conftest import SMALL, phases
from tests.cli.running import SCRIPT, asked, invoke, run
from tests.service import environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Compiled


def test_pull_compiles_and_tells_how_true_it_is(compiled: Compiled) -> None:
    """The phases come in their order; what it made is listed, with its fidelity, and shown in detail."""
    assert phases(compiled.interrupted.stderr) == ["resolve", "download", "verify", "compile"]
    assert phases(compiled.pulling)[-3:] == ["compile", "compare", "ready"]
    made = compiled.pulled["compiled"]
    assert (made["backend"], made["precision"]) == ("openvino", "fp32")
    assert made["fidelity"]["min_cosine"] >= 0.999
    listed = run(compiled.directory, "list", "--json", OFFLINE="true", **compiled.settings)
    (model,) = [one for one in json.loads(listed.stdout)["models"] if one["model_name"] == SMALL]
    sizes = {artifact["precision"]: artifact["size"] for artifact in model["artifacts"]}
    assert sizes["fp32"] == made["size"]
    assert model["size"] == model["files_size"] + sum(sizes.values())
    shown = run(compiled.directory, "show", "small", **compiled.settings)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^  dimensions +48$", shown.stdout, re.MULTILINE)


def test_an_interrupt_while_it_compiles_leaves_nothing_behind(compiled: Compiled) -> None:
    """Ctrl-C ends with 130 and says how to go on; no process and no half-made file is left. The next pull went on."""
    done = compiled.interrupted
    assert (done.returncode, done.stdout) == (130, "")
    assert "The same command goes on with it" in done.stderr
    assert "Traceback" not in done.stderr
    assert compiled.left == []
    assert "download" not in phases(compiled.pulling), "fetched before the interrupt, and kept"


def test_rm_all_takes_compiled_forms_whose_model_is_gone(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no model is left to be named; without --yes it asks for them, too."""
    cache = shutil.copytree(compiled.directory / "cache", tmp_path / "cache")
    for name, value in (compiled.settings | {"CACHE_DIR": str(cache), "OFFLINE": "true"}).items():
        monkeypatch.setenv(f"EMB_PROVIDER_{name}", value)
    monkeypatch.chdir(tmp_path)
    artifacts = {path.parent for path in cache.glob("artifacts/*/model.bin")}
    assert artifacts
    shutil.rmtree(cache / "snapshots")
    refused = invoke("rm", "--all")
    assert refused.exit_code == 2
    assert f"{len(artifacts)} compiled form(s)" in refused.stderr
    assert all(artifact.exists() for artifact in artifacts)
    assert set(asked("rm", "--all", "-y")["artifacts"]) == {artifact.name for artifact in artifacts}
    assert not any(artifact.exists() for artifact in artifacts)


def test_a_damaged_compiled_form_is_found_and_put_away(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte of it that changed is status 1; --repair removes that form alone, so that it is compiled anew."""
    cache = shutil.copytree(compiled.directory / "cache", tmp_path / "cache")
    for name, value in (compiled.settings | {"CACHE_DIR": str(cache), "OFFLINE": "true"}).items():
        monkeypatch.setenv(f"EMB_PROVIDER_{name}", value)
    monkeypatch.chdir(tmp_path)
    weights = next(cache.glob("artifacts/*/model.bin"))
    weights.write_bytes(b"?" + weights.read_bytes()[1:])
    found = asked("verify", "small", status=1)
    assert found["models"][0]["damaged_artifacts"] == [weights.parent.name]
    repaired = invoke("verify", "small", "--repair")
    assert repaired.exit_code == 0, repaired.output
    assert "emb-provider pull acme/small" in repaired.stderr
    assert not weights.parent.exists()
    assert asked("verify", "small")["ok"] is True


def test_embed_prints_an_array_a_text(compiled: Compiled) -> None:
    """From arguments, a file and standard input alike, in their order; --json has each text beside its vector."""
    directory, settings = compiled.directory, compiled.settings | {"OFFLINE": "true"}
    (directory / "texts.txt").write_text("two\nthree\n", encoding="utf-8")
    done = run(directory, "embed", "one", "@texts.txt", "-", "-m", "small", stdin="three\n\n", **settings)
    assert done.returncode == 0, done.stderr
    vectors = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(vector) for vector in vectors] == [48] * 5
    assert vectors[2] == pytest.approx(vectors[3], abs=1e-6)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-3)
    assert sum(value * value for value in vectors[0]) == pytest.approx(1, abs=1e-4)
    (line,) = run(directory, "embed", "one", "--json", **settings).stdout.splitlines()
    told = json.loads(line)
    assert (told["index"], told["text"]) == (0, "one")
    assert told["embedding"] == pytest.approx(vectors[0], abs=1e-6)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_embed_reads_what_a_command_writes(compiled: Compiled) -> None:
    """`@<(command)` is a pipe, and read as a file; a directory is none."""
    line = f'"{SCRIPT}" embed @<(echo one; echo two)'
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=compiled.directory,
        env=environment(compiled.directory, OFFLINE="true", **compiled.settings),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    refused = invoke("embed", f"@{compiled.directory}")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "no such file" in refused.stderr
