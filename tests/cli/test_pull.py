"""`pull`, from hubs on this machine."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cli.conftest import COPY, SMALL
from tests.cli.helpers import invoke, invoke_json, phases, pull_files, run, start
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS
from tests.service import wait_until

if TYPE_CHECKING:
    from emb_model_provider.settings import Settings
    from tests.cli.conftest import Compiled
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer


@pytest.mark.parametrize(("name", "options"), [(HF_REPO, ()), (MS_REPO, ("--source", "modelscope"))])
def test_pull_prints_where_the_files_are(name: str, options: tuple[str, ...], here: Path) -> None:
    directory = pull_files(name, *options)
    assert (directory / "config.json").is_file()
    (model,) = invoke_json("pull", name, *options, "--no-compile")["models"]
    assert (model["path"], model["model_name"]) == (str(directory), name)
    assert model["size"] == sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    assert model["compiled"] is None


def test_a_second_pull_sends_no_request_unless_forced(here: Path, huggingface: HuggingFaceServer) -> None:
    """--force asks the hub, and downloads no file that is unchanged."""
    pull_files(HF_REPO)
    huggingface.forget()
    pull_files(HF_REPO)
    assert huggingface.requests == []
    pull_files(HF_REPO, "--force")
    assert huggingface.requests
    assert not huggingface.bodies()


def test_pull_without_an_id_pulls_all_models_of_the_settings(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = {"one": {"name": HF_REPO}, "two": {"name": MS_REPO, "source": "modelscope"}}
    monkeypatch.setenv("EMB_PROVIDER_MODEL_MAPPING", json.dumps(mapping))
    models = invoke_json("pull", "--no-compile")["models"]
    assert [(model["alias"], model["source"]) for model in models] == [("one", "huggingface"), ("two", "modelscope")]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://huggingface.co/acme/tiny/tree/main", HF_REPO),
        ("hf.co/acme/tiny", HF_REPO),
        ("https://www.modelscope.cn/models/iic/tiny/summary", MS_REPO),
    ],
)
def test_urls_of_hubs_are_ids(url: str, name: str, here: Path) -> None:
    """In every command."""
    pull_files(url)
    (model,) = invoke_json("show", url)["models"]
    assert model["model_name"] == name
    assert invoke("verify", url).exit_code == 0
    assert invoke("rm", "-y", "-q", url).stdout == f"{name}\n"


@pytest.mark.parametrize(
    ("name", "options", "suggested"),
    [
        ("tiny", (), HF_REPO),
        ("acne/tiny", (), HF_REPO),
        ("acme_tiny", (), HF_REPO),
        ("acme/tinny", (), None),
        ("tiny", ("--source", "modelscope"), MS_REPO),
        ("iic_tiny", ("--source", "modelscope"), MS_REPO),
        ("damo/tiny", (), MS_REPO),
    ],
)
def test_similar_repositories_are_suggested(
    name: str, options: tuple[str, ...], suggested: str | None, here: Path
) -> None:
    """For an id without its owner, with a wrong owner, or as models on disk are named over HTTP."""
    result = invoke("pull", name, *options, "--no-compile")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("Did you mean") == (suggested is not None)
    assert suggested is None or f"Did you mean {suggested}?" in result.stderr


def test_an_unreachable_hub_names_the_other_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id without its owner is named as such, because the hub cannot be asked for similar ones."""
    for hub, other in (("huggingface", "modelscope"), ("modelscope", "huggingface")):
        monkeypatch.setenv("EMB_PROVIDER_HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("EMB_PROVIDER_MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
        result = invoke("pull", "acme/tiny", "--source", hub, "--no-compile")
        assert result.exit_code == 1
        assert f"`--source {other}`" in result.stderr
        assert "a repository id is owner/name" not in result.stderr
    assert "a repository id is owner/name" in invoke("pull", "tiny", "--no-compile").stderr


def test_an_id_can_have_a_revision(here: Path, huggingface: HuggingFaceServer) -> None:
    """An unknown revision exits with 2 and names those that exist."""
    huggingface.revisions = ("main", "v2")
    pull_files(f"{HF_REPO}@v2")
    (model,) = invoke_json("list")["models"]
    assert model["asked_revision"] == "v2"
    unknown = invoke("pull", f"{HF_REPO}@v3", "--no-compile")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "v2" in unknown.stderr


def test_pull_copies_the_files_to_a_directory(here: Path) -> None:
    """The copy contains files, not links, and the output says how to serve it."""
    result = invoke("pull", HF_REPO, "--no-compile", "--to", "copy")
    assert result.exit_code == 0, result.output
    assert (here / "copy" / "model.safetensors").read_bytes() == WEIGHTS
    assert not any(path.is_symlink() for path in (here / "copy").rglob("*"))
    assert result.stderr.endswith("To serve: emb-provider serve copy\n")


@pytest.mark.parametrize(
    ("arguments", "served"),
    [
        ((HF_REPO,), HF_REPO),
        ((f"{HF_REPO}@main", "--precision", "int8"), f"{HF_REPO}@main --precision int8"),
        ((HF_REPO, "--revision", "main"), f"{HF_REPO} --revision main"),
        ((HF_REPO, HF_REPO, "--source", "huggingface"), f"{HF_REPO} --source huggingface"),
    ],
    ids=" ".join,
)
def test_pull_ends_with_the_command_that_serves_the_models(
    arguments: tuple[str, ...], served: str, here: Path, serving: list[Settings]
) -> None:
    """The command serves what was pulled, at the same revision and precision."""
    pulled = invoke("pull", *arguments, "--no-compile")
    assert pulled.stderr.endswith(f"To serve: emb-provider serve {served}\n")
    invoke("serve", *served.split())
    (spec,) = serving[0].models.specs()
    assert (spec.alias, spec.name) == (HF_REPO, HF_REPO)
    assert ("int8" in arguments, "main" in served) == (spec.precision == "int8", spec.revision == "main")


def test_excluded_files_are_not_downloaded(here: Path, huggingface: HuggingFaceServer) -> None:
    """Nothing is compiled then, even without --no-compile."""
    result = invoke("pull", HF_REPO, "--exclude", "tokenizer*", "-q")
    assert result.exit_code == 0, result.output
    assert "tokenizer.json" not in huggingface.bodies()
    assert (Path(result.stdout.strip()) / "model.safetensors").is_file()


def test_a_model_that_fails_does_not_affect_the_others(here: Path) -> None:
    """Stderr names it, and the exit code is that of its error."""
    result = invoke("pull", "acme/nothing", HF_REPO, "--no-compile", "--json")
    assert result.exit_code == 2
    assert [model["model_name"] for model in json.loads(result.stdout)["models"]] == [HF_REPO]
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: acme/nothing: ")]
    assert "Hugging Face" in error


@pytest.mark.slow
def test_pull_compiles_and_reports_the_fidelity(compiled: Compiled) -> None:
    assert phases(compiled.stderr)[-3:] == ["compile", "compare", "ready"]
    pulled = compiled.pulled["compiled"]
    assert (pulled["backend"], pulled["precision"]) == ("openvino", "fp32")
    assert pulled["fidelity"]["min_cosine"] >= 0.999
    listed = run(compiled.directory, "list", "--json", OFFLINE="true", **compiled.settings)
    (model,) = [model for model in json.loads(listed.stdout)["models"] if model["model_name"] == SMALL]
    sizes = {artifact["precision"]: artifact["size"] for artifact in model["artifacts"]}
    assert sizes["fp32"] == pulled["size"]
    assert model["size"] == model["files_size"] + sum(sizes.values())


# --- interrupts ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupt_while_compiling_leaves_nothing_behind(compiled: Compiled) -> None:
    """No process and no unfinished artifact is left. The next pull uses the files that were downloaded.

    The command does not begin with the next model.
    """
    done = compiled.interrupted
    assert phases(done.stderr) == ["resolve", "download", "verify", "compile"]
    assert (done.returncode, done.stdout) == (130, "")
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert COPY not in done.stderr
    assert compiled.left == []
    assert "download" not in phases(compiled.stderr)


def test_an_interrupted_download_can_be_continued(
    tmp_path: Path, settings: dict[str, str], modelscope: ModelScopeServer
) -> None:
    """Ctrl-C in the middle of a file exits with 130 at once. The next pull completes the model."""
    modelscope.faults.hold_after["pytorch_model.bin"] = 100_000
    arguments = ("pull", MS_REPO, "--source", "modelscope", "--no-compile", "-q")
    process = start(tmp_path, *arguments, **settings)
    try:
        wait_until(lambda: modelscope.bodies()["pytorch_model.bin"] == 1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stdout) == (130, "")
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
    listed = json.loads(run(tmp_path, "list", "--json", **settings).stdout)["models"]
    assert [model["state"] for model in listed] == ["incomplete"]
    modelscope.faults.hold_after.clear()
    done = run(tmp_path, *arguments, **settings)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "pytorch_model.bin").read_bytes() == WEIGHTS
