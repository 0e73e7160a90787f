"""`list`, `show` and `verify`."""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.cli.helpers import invoke, invoke_json, pull_files, run, run_python
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Compiled

MODEL_KEYS = {
    "id", "model_name", "source", "revision", "asked_revision", "path", "state", "size", "files_size",
    "artifacts", "fetched", "last_used", "in_use",
}  # fmt: skip


# --- list ---------------------------------------------------------------------------------------------


def test_list_as_json(here: Path) -> None:
    """Sizes are integers, and times are in UTC. --json takes precedence over -q."""
    assert invoke_json("list") == {"models": [], "total_size": 0}
    pull_files(HF_REPO)
    pull_files(MS_REPO, "--source", "modelscope")
    listed = invoke_json("list")
    assert {model["model_name"]: model["source"] for model in listed["models"]} == {
        HF_REPO: "huggingface",
        MS_REPO: "modelscope",
    }
    for model in listed["models"]:
        assert set(model) == MODEL_KEYS
        assert model["state"] == "complete"
        assert isinstance(model["size"], int)
        assert model["fetched"].endswith("Z")
    assert listed["total_size"] == sum(model["size"] for model in listed["models"])
    assert invoke_json("list", "-q") == listed


def test_list_as_text(here: Path) -> None:
    """A table with a line per model, or with -q only the ids."""
    assert "emb-provider pull ID" in invoke("list").stderr
    pull_files(HF_REPO)
    pull_files(MS_REPO, "--source", "modelscope")
    head, *lines = invoke("models", "list").stdout.splitlines()
    assert head.split()[:3] == ["ID", "SOURCE", "REVISION"]
    assert {line.split()[0] for line in lines} == {HF_REPO, MS_REPO}
    assert set(invoke("list", "-q").stdout.split()) == {HF_REPO, MS_REPO}


def test_json_has_the_fields_of_the_http_api(here: Path) -> None:
    """The HTTP API has one field more, which only a server knows."""
    from emb_model_provider.api.schemas import management as http

    assert MODEL_KEYS | {"served_as"} == set(http.CachedModel.model_fields)
    pull_files(HF_REPO)
    verified = invoke_json("verify")
    assert set(verified) == set(http.VerifiedModels.model_fields)
    assert set(verified["models"][0]) | {"served_as"} == set(http.VerifiedModel.model_fields)
    assert set(invoke_json("rm", HF_REPO, "--dry-run")) == set(http.Removed.model_fields)


def test_list_all_includes_models_of_other_programs(here: Path) -> None:
    """A repository in a hub's cache without a manifest is `unverified`, and listed only with --all."""
    pull_files(HF_REPO)
    for manifest in (here / "cache").rglob("*.json"):
        manifest.unlink()
    assert invoke_json("list")["models"] == []
    (model,) = invoke_json("list", "--all")["models"]
    assert (model["model_name"], model["state"]) == (HF_REPO, "unverified")


def test_list_imports_no_runtime(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from emb_model_provider.cli.main import main\n"
        "main(['list'], standalone_mode=False)\n"
        "heavy = {'torch', 'openvino', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = run_python(tmp_path, program)
    assert done.returncode == 0, done.stderr


# --- show ---------------------------------------------------------------------------------------------


def test_show_lists_the_files_with_their_hashes(here: Path) -> None:
    """A model is found by its name and by its cache id."""
    pull_files(HF_REPO)
    for name in (HF_REPO, HF_REPO.replace("/", "_")):
        (model,) = invoke_json("show", name)["models"]
        paths = {file["path"] for file in model["details"]["files"]}
        assert paths >= {"config.json", "model.safetensors"}
    text = invoke("show", HF_REPO).stdout
    assert model["path"] in text
    for file in model["details"]["files"]:
        assert re.search(rf"^    {re.escape(file['path'])} .*{file['sha256']}$", text, re.MULTILINE)


def test_show_of_an_unknown_model_names_similar_ones(here: Path) -> None:
    pull_files(HF_REPO)
    unknown = invoke("show", "acme/tinny")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert HF_REPO in unknown.stderr


@pytest.mark.slow
def test_show_describes_a_compiled_model(compiled: Compiled) -> None:
    shown = run(compiled.directory, "show", "small", **compiled.settings)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^  dimensions +48$", shown.stdout, re.MULTILINE)
    assert re.search(r"^  compiled +fp32, .*, fidelity (1\.0000|0\.9999)", shown.stdout, re.MULTILINE)


# --- verify -------------------------------------------------------------------------------------------


def test_verify_reports_a_changed_byte_and_repairs_it(here: Path) -> None:
    """Exit code 1 and the name of the file. After --repair, the file is as it was downloaded."""
    weights = pull_files(HF_REPO) / "model.safetensors"
    assert invoke_json("verify", HF_REPO)["ok"] is True
    stamps = weights.stat()
    weights.resolve().write_bytes(b"?" + WEIGHTS[1:])
    os.utime(weights, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))  # so that only hashing shows the difference
    result = invoke_json("verify", status=1)
    assert result["ok"] is False
    assert result["models"][0]["findings"] == [{"path": "model.safetensors", "problem": "bytes"}]
    text = invoke("verify")
    assert text.exit_code == 1
    assert "model.safetensors: has the wrong content" in text.stdout
    assert "emb-provider verify --repair" in text.stderr
    assert invoke_json("verify", "--repair")["ok"] is True
    assert weights.read_bytes() == WEIGHTS


def test_verify_without_an_id_is_limited_by_revision_and_source(here: Path) -> None:
    pull_files(HF_REPO)
    pull_files(MS_REPO, "--source", "modelscope")
    names = {
        MS_REPO: ("--source", "modelscope"),
        HF_REPO: ("--revision", invoke_json("show", HF_REPO)["models"][0]["revision"]),
    }
    for name, options in names.items():
        assert [model["model_name"] for model in invoke_json("verify", *options)["models"]] == [name]


@pytest.mark.slow
def test_verify_repair_removes_a_damaged_compiled_form(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the damaged one, so that it is compiled again."""
    cache = shutil.copytree(compiled.directory / "cache", tmp_path / "cache")
    for name, value in (compiled.settings | {"CACHE_DIR": str(cache), "OFFLINE": "true"}).items():
        monkeypatch.setenv(f"EMB_PROVIDER_{name}", value)
    monkeypatch.chdir(tmp_path)
    weights = next(cache.glob("artifacts/*/model.bin"))
    weights.write_bytes(b"?" + weights.read_bytes()[1:])
    result = invoke_json("verify", "small", status=1)
    assert result["models"][0]["damaged_artifacts"] == [weights.parent.name]
    repaired = invoke("verify", "small", "--repair")
    assert repaired.exit_code == 0, repaired.output
    assert "emb-provider pull acme/small" in repaired.stderr
    assert not weights.parent.exists()
    assert invoke_json("verify", "small")["ok"] is True
