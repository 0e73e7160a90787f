"""`mirror`, and `verify`, `show`, `serve`, `embed` and `load` of its directory."""

from __future__ import annotations

import json
import re
import shutil
import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest
from transformers import BertModel

from emb_model_provider.model_spec import MIRROR_MANIFEST
from tests.backends.pytorch.test_repositories import write_adapter
from tests.cli.helpers import SCRIPT, invoke, invoke_json, run, start
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS
from tests.hubs.servers import HuggingFaceServer
from tests.hubs.test_dependencies import LORA, adapter_files
from tests.models import FAMILIES
from tests.service import Service, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hubs.servers import ModelScopeServer

TEXTS = ("how do i reset my password", "i forgot my login", "weather")


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# --- mirror -------------------------------------------------------------------------------------------


def test_mirror_reports_what_it_has_copied(here: Path, huggingface: HuggingFaceServer) -> None:
    """A second run copies nothing, and sends no request without --force."""
    first = invoke_json("mirror", HF_REPO, "usb")
    files = [path for path in (here / "usb").rglob("*") if path.is_file()]
    assert first == {
        "name": HF_REPO,
        "model_name": HF_REPO,
        "source": "huggingface",
        "revision": huggingface.commit(HF_REPO),
        "directory": str(here / "usb"),
        "files": len(files) - 1,
        "size": sum(path.stat().st_size for path in files if path.name != MIRROR_MANIFEST),
        "copied_files": len(files) - 1,
        "copied_bytes": first["size"],
        "removed": [],
    }
    huggingface.forget()
    second = invoke("mirror", HF_REPO, "usb", "--progress", "none")
    assert (second.exit_code, "copied  0 B in 0 files" in second.stdout) == (0, True)
    assert "emb-provider verify usb" in second.stderr
    assert huggingface.requests == []
    assert invoke("mirror", HF_REPO, "usb", "-q").stdout == f"{here / 'usb'}\n"
    del huggingface.repos[HF_REPO]["README.md"]
    assert invoke_json("mirror", HF_REPO, "usb", "--force")["removed"] == ["README.md"]


def test_mirror_of_a_revision_and_a_source(here: Path, modelscope: ModelScopeServer) -> None:
    mirrored = invoke_json("mirror", f"{MS_REPO}@master", "usb", "--source", "modelscope")
    assert (mirrored["source"], mirrored["revision"]) == ("modelscope", "master")


def test_mirror_into_a_directory_with_other_files_exits_with_2(here: Path) -> None:
    (here / "notes.txt").write_text("")
    refused = invoke("mirror", HF_REPO, ".")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "is not empty, and not a mirror (" in refused.stderr
    assert not (here / "config.json").exists()


def test_pull_to_a_directory_makes_it_a_mirror(here: Path, huggingface: HuggingFaceServer) -> None:
    """Of an adapter it contains, and the size includes, the base model."""
    huggingface.repos[LORA] = adapter_files(HF_REPO)
    (pulled,) = invoke_json("pull", LORA, "--no-compile", "--to", "usb")["models"]
    (verified,) = invoke_json("verify", "usb")["models"]
    assert (here / "usb/.dependencies/acme--tiny/model.safetensors").read_bytes() == WEIGHTS
    assert pulled["size"] > len(WEIGHTS)
    assert (pulled["copied_to"], verified["ok"]) == (str(here / "usb"), True)
    assert pulled["files"] + 1 == len([path for path in (here / "usb").rglob("*") if path.is_file()])


def test_pull_of_a_mirror_says_how_to_serve_it(here: Path) -> None:
    invoke_json("mirror", HF_REPO, "usb")
    pulled = invoke("pull", "usb", "--no-compile")
    assert pulled.stderr.endswith("To serve: emb-provider serve usb\n")
    assert pulled.stdout.startswith(f"{HF_REPO} (huggingface, ")


# --- verify and show ----------------------------------------------------------------------------------


def test_verify_of_a_mirror_names_every_difference(here: Path) -> None:
    """Missing, changed and extra files; the exit code is 1. No hub is needed, and nothing in the directory changes."""
    invoke_json("mirror", HF_REPO, "usb")
    shutil.copytree(here / "usb", here / "copy")
    for name in ("cache", "hf", "usb"):
        shutil.rmtree(here / name)
    assert invoke("verify", "copy").stdout == f"{here / 'copy'} (local): ok, 200 kB\n"
    (here / "copy/1_Pooling/config.json").unlink()
    (here / "copy/model.safetensors").write_bytes(WEIGHTS[::-1])
    (here / "copy/.dependencies").mkdir()
    (here / "copy/.dependencies/extra.bin").write_bytes(b"")
    before = files_of(here / "copy")
    result = invoke_json("verify", "copy", status=1)
    assert {(each["path"], each["problem"]) for each in result["models"][0]["findings"]} == {
        ("1_Pooling/config.json", "missing"),
        ("model.safetensors", "bytes"),
        (".dependencies/extra.bin", "extra"),
    }
    text = invoke("verify", "copy")
    assert text.exit_code == 1
    assert ".dependencies/extra.bin: is not in the manifest" in text.stdout
    assert "Copy the mirror again" in text.stderr
    assert "--repair" not in text.stderr
    assert "mirrors are not repaired" in invoke("verify", "copy", "--repair").stderr
    assert files_of(here / "copy") == before


def test_verify_without_an_id_includes_mirrors_that_were_loaded(here: Path) -> None:
    """A manifest that is invalid does not keep other models from being verified."""
    invoke_json("mirror", HF_REPO, "usb")
    invoke_json("pull", "usb", "--no-compile")
    assert [model["ok"] for model in invoke_json("verify")["models"]] == [True, True]
    (here / "usb" / MIRROR_MANIFEST).write_text("{")
    results = {model["model_name"]: model for model in invoke_json("verify", status=1)["models"]}
    assert results[HF_REPO]["ok"] is True
    assert results[str(here / "usb")]["findings"] == [{"path": MIRROR_MANIFEST, "problem": "bytes"}]


@pytest.mark.parametrize(
    ("content", "exit_code", "phrase"),
    [(None, 2, "without mirror-manifest.json"), ("{", 1, "is invalid"), ('{"complete": false}', 1, "is invalid")],
)
def test_verify_of_a_directory_that_is_no_complete_mirror_fails(
    content: str | None, exit_code: int, phrase: str, here: Path
) -> None:
    invoke_json("mirror", HF_REPO, "usb")
    (here / "usb" / MIRROR_MANIFEST).unlink()
    if content is not None:
        (here / "usb" / MIRROR_MANIFEST).write_text(content)
    result = invoke("verify", "usb")
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert phrase in result.stderr


def test_show_of_a_mirror_has_its_origin(here: Path, huggingface: HuggingFaceServer) -> None:
    invoke_json("mirror", HF_REPO, "usb")
    shutil.rmtree(here / "cache")
    (model,) = invoke_json("show", "usb")["models"]
    assert (model["source"], model["revision"]) == ("local", huggingface.commit(HF_REPO))
    assert model["details"]["mirror_of"] == f"{HF_REPO} (huggingface)"
    assert re.search(rf"^  mirror of +{HF_REPO} \(huggingface\)$", invoke("show", "usb").stdout, re.MULTILINE)


def test_load_with_the_changed_file_named(here: Path) -> None:
    invoke_json("mirror", HF_REPO, "usb")
    (here / "usb" / "tokenizer.json").unlink()
    refused = invoke("embed", "--model", "usb", "text")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert f"tokenizer.json in the mirror {here / 'usb'} is missing" in refused.stderr
    assert "emb-provider verify" in refused.stderr


# --- processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("mirror", HF_REPO, "usb"),
        pytest.param(("pull", HF_REPO, "--no-compile", "--to", "usb"), marks=pytest.mark.slow),
    ],
)
def test_killed_mirror_is_continued(
    arguments: tuple[str, ...], tmp_path: Path, settings: dict[str, str], huggingface: HuggingFaceServer
) -> None:
    """After SIGKILL at any moment the directory is not served; the same command completes it."""
    huggingface.repos[HF_REPO] |= {f"part{number}.json": WEIGHTS for number in range(200)}
    run(tmp_path, "pull", HF_REPO, "--no-compile", **settings)
    process = start(tmp_path, *arguments, **settings)
    wait_until(lambda: len(list((tmp_path / "usb").glob("*.json"))) > 5)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    refused = run(tmp_path, "pull", "usb", "--no-compile", **settings)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is incomplete" in refused.stderr
    done = run(tmp_path, *arguments, **settings)
    assert done.returncode == 0, done.stderr
    assert run(tmp_path, "verify", "usb", **settings).returncode == 0
    assert not list((tmp_path / "usb").rglob("*incomplete*"))


@pytest.mark.slow
@pytest.mark.parametrize("is_adapter", [False, True])
def test_mirror_is_served_in_a_closed_network(tmp_path: Path, is_adapter: bool) -> None:
    """The vectors are those from before, under the name of the repository, after the hub and all caches are gone.

    A model that was compiled before is not compiled again.
    """
    model, base = "acme/small", "acme/base"
    directory = FAMILIES["bert-mean-normalize"](tmp_path / "made" / "base")
    if is_adapter:
        write_adapter(BertModel.from_pretrained(directory), tmp_path / "made" / "lora", base)
        repos = {base: files_of(directory), model: files_of(tmp_path / "made" / "lora")}
    else:
        repos = {model: files_of(directory)}
    common = {"DEVICE": "cpu", "MODEL_PRECISION": "fp32"}
    office, closed = tmp_path / "office", tmp_path / "closed"
    office.mkdir()
    closed.mkdir()
    with HuggingFaceServer(repos) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_CACHE_DIR": str(office / "hf"), **common}
        mirrored = run(office, "mirror", model, "usb", "--json", **settings)
        assert mirrored.returncode == 0, mirrored.stderr
        embedded = run(office, "embed", "--model", model, *TEXTS, **settings)
        assert embedded.returncode == 0, embedded.stderr
        commit = hub.commit(model)
    expected = np.array([json.loads(line) for line in embedded.stdout.splitlines()])
    shutil.copytree(office / "usb", closed / "model", copy_function=shutil.copyfile)
    if not is_adapter:
        shutil.copytree(office / "cache" / "artifacts", closed / "cache" / "artifacts")
    compiled = {path: path.stat().st_ino for path in closed.glob("cache/artifacts/*/model.bin")}
    shutil.rmtree(office)
    shutil.rmtree(tmp_path / "made")

    offline = {"HF_ENDPOINT": hub.url, **common}
    verified = run(closed, "verify", "model", **offline)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    with Service(closed, command=[str(SCRIPT), "serve", "model"], MODEL_NAME="acme/other", **offline) as service:
        service.wait()
        (served,) = service.http.get("/v1/models").json()["data"]
        assert (served["id"], served["source"], served["revision"]) == (model, "huggingface", commit)
        response = service.embed(*TEXTS, model=model).json()
        vectors = np.array([each["embedding"] for each in response["data"]])
        for name in (model, str(closed / "model")):
            path = {"MODEL_PATH": str(closed / "model"), "PORT": str(service.port)}
            loaded = run(closed, "load", name, "--json", **offline, **path)
            assert json.loads(loaded.stdout)["state"] == "ready", loaded.stderr
        assert run(closed, "mirror", "model", "second", **offline).returncode == 0
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    direct = run(closed, "embed", "--model", "model", *TEXTS, **offline)
    assert direct.returncode == 0, direct.stderr
    np.testing.assert_allclose([json.loads(line) for line in direct.stdout.splitlines()], expected, atol=1e-6)
    shown = json.loads(run(closed, "show", "model", "--json", **offline).stdout)["models"][0]
    assert (shown["revision"], shown["details"]["mirror_of"]) == (commit, f"{model} (huggingface)")
    assert [artifact["precision"] for artifact in shown["artifacts"]] == ["fp32"]
    assert len(compiled) == (0 if is_adapter else 1)
    assert {path: path.stat().st_ino for path in compiled} == compiled

    weights = next(path for path in (closed / "model").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    refused = run(closed, "embed", "--model", "model", "text", **offline)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"{weights.relative_to(closed / 'model')} in the mirror" in refused.stderr
