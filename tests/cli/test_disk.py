"""pull, list, show, verify, rm and prune, on hubs of this machine and a disk of the test's own."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.cli.options import spec_of
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.settings.loading import load_settings
from tests.cli.running import SCRIPT, asked, invoke, run
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS
from tests.service import environment, wait_until

if TYPE_CHECKING:
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer

MODEL_KEYS = {
    "id", "model_name", "source", "revision", "asked_revision", "path", "state", "size", "files_size",
    "artifacts", "fetched", "last_used", "in_use",
}  # fmt: skip


def files_below(directory: Path) -> set[str]:
    """Return all that lies in the caches there, empty directories too."""
    caches = [directory / name for name in ("cache", "hf", "ms")]
    return {path.as_posix() for cache in caches for path in cache.rglob("*")}


def pull(*arguments: str) -> str:
    """Pull without compiling, and return the directory that is printed."""
    result = invoke("pull", *arguments, "--no-compile", "-q")
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


# --- pull ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [(HF_REPO, ()), (MS_REPO, ("--source", "modelscope"))])
def test_pull_fetches_once_and_says_where(name: str, options: tuple[str, ...], here: Path) -> None:
    """It prints the directory alone; the files are there; a second time nothing is asked for."""
    directory = Path(pull(name, *options))
    assert (directory / "config.json").is_file()
    again = asked("pull", name, *options, "--no-compile")
    (model,) = again["models"]
    assert (model["path"], model["model_name"]) == (str(directory), name)
    assert model["size"] == sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    assert model["compiled"] is None


def test_a_second_pull_asks_no_hub_and_force_does(here: Path, huggingface: HuggingFaceServer) -> None:
    """What is here is used as it is; --force asks, and fetches no file that has not changed."""
    pull(HF_REPO)
    huggingface.forget()
    pull(HF_REPO)
    assert huggingface.requests == []
    pull(HF_REPO, "--force")
    assert huggingface.requests
    assert not huggingface.bodies()


def test_pull_without_an_id_pulls_the_settings(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model of MODEL_MAPPING, each from its hub, under its alias."""
    mapping = {"one": {"name": HF_REPO}, "two": {"name": MS_REPO, "source": "modelscope"}}
    monkeypatch.setenv("EMB_PROVIDER_MODEL_MAPPING", json.dumps(mapping))
    models = asked("pull", "--no-compile")["models"]
    assert [(one["alias"], one["source"]) for one in models] == [
        ("one", "huggingface"),
        ("two", "modelscope"),
    ]


def test_pull_takes_a_revision_behind_an_at(here: Path, huggingface: HuggingFaceServer) -> None:
    """ID@REV is fetched at that revision, and listed with it; one that is not there ends with 2 and those that are."""
    huggingface.revisions = ("main", "v2")
    pull(f"{HF_REPO}@v2")
    (model,) = asked("list")["models"]
    assert model["asked_revision"] == "v2"
    wrong = invoke("pull", f"{HF_REPO}@v3", "--no-compile")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "v2" in wrong.stderr


def test_pull_copies_to_a_directory(here: Path) -> None:
    """--to has the files themselves, as a directory that can be served from; the text says so."""
    result = invoke("pull", HF_REPO, "--no-compile", "--to", "copy")
    assert result.exit_code == 0, result.output
    assert (here / "copy" / "model.safetensors").read_bytes() == WEIGHTS
    assert not any(path.is_symlink() for path in (here / "copy").rglob("*"))
    assert f"EMB_PROVIDER_MODEL_PATH={here / 'copy'}" in result.stdout


def test_pull_leaves_out_what_patterns_exclude(here: Path, huggingface: HuggingFaceServer) -> None:
    """--exclude, and nothing is compiled then, though that was not said."""
    result = invoke("pull", HF_REPO, "--exclude", "tokenizer*", "-q")
    assert result.exit_code == 0, result.output
    assert "tokenizer.json" not in huggingface.bodies()
    assert (Path(result.stdout.strip()) / "model.safetensors").is_file()


def test_one_of_several_that_fails_costs_only_itself(here: Path) -> None:
    """The others are here; stderr names it, and the exit status is its own."""
    result = invoke("pull", "acme/nothing", HF_REPO, "--no-compile", "--json")
    assert result.exit_code == 2
    assert [one["model_name"] for one in json.loads(result.stdout)["models"]] == [HF_REPO]
    assert "Error: acme/nothing: Hugging Face has no repository acme/nothing" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pull", "a/b", "c/d", "--revision", "x"), "ID@REV"),
        (("pull", "a/b@x", "--revision", "y"), "once"),
        (("pull", "a/b", "c/d", "--to", "x"), "--to goes with one ID"),
        (("rm",), "--all"),
        (("rm", "--all", "a/b"), "--all"),
        (("rm", "--all", "--source", "modelscope"), "--all goes without"),
        (("rm", "a/b", "-y", "--url", "http://127.0.0.1:1"), "--url goes with --unload"),
        (("embed",), "TEXT"),
        (("embed", "@nowhere.txt"), "no such file"),
        (("models", "serve"), "No such command"),
        (("show", ""), "empty"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...], words: str, here: Path) -> None:
    """A word on stderr says what was wrong; stdout stays empty, and nothing is fetched."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert not (here / "hf").exists()


def test_a_home_that_nobody_has_is_one_line(here: Path) -> None:
    """`~nobody/model` is no directory: status not 0, and what to write instead."""
    result = invoke("pull", "~nobody-of-this-name/model", "--no-compile")
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert "Error:" in result.stderr


# --- list and show ------------------------------------------------------------------------------------


def test_list_tells_what_is_here(here: Path) -> None:
    """JSON has bytes as integers and times in UTC; the table has a line for each model; -q has names alone."""
    assert asked("list") == {"models": [], "total_size": 0}
    pull(HF_REPO)
    pull(MS_REPO, "--source", "modelscope")
    found = asked("list")
    assert {one["model_name"]: one["source"] for one in found["models"]} == {
        HF_REPO: "huggingface",
        MS_REPO: "modelscope",
    }
    for one in found["models"]:
        assert set(one) == MODEL_KEYS
        assert one["state"] == "complete"
        assert isinstance(one["size"], int)
        assert one["fetched"].endswith("Z")
    assert found["total_size"] == sum(one["size"] for one in found["models"])
    assert asked("list", "-q") == found, "JSON wherever it is asked for"
    head, *lines = invoke("models", "list").stdout.splitlines()
    assert head.split()[:3] == ["ID", "SOURCE", "REVISION"]
    assert {line.split()[0] for line in lines} == {HF_REPO, MS_REPO}
    assert set(invoke("list", "-q").stdout.split()) == {HF_REPO, MS_REPO}


def test_json_is_named_as_the_http_api_names_it(here: Path) -> None:
    """Whoever reads the one can read the other: what HTTP has more is what only a server knows."""
    from emb_model_provider.api.schemas.openai import management as http

    assert MODEL_KEYS | {"served_as"} == set(http.CachedModel.model_fields)
    pull(HF_REPO)
    verified = asked("verify")
    assert set(verified) == set(http.VerifiedModels.model_fields)
    assert set(verified["models"][0]) | {"served_as"} == set(http.VerifiedModel.model_fields)
    assert set(asked("rm", HF_REPO, "--dry-run")) == set(http.Removed.model_fields)


def test_list_all_names_what_other_programs_left(here: Path) -> None:
    """A repository in the hub's cache that no manifest of ours speaks for is `unverified`, and only listed with --all."""
    pull(HF_REPO)
    for manifest in (here / "cache").rglob("*.json"):
        manifest.unlink()
    assert asked("list")["models"] == []
    (found,) = asked("list", "--all")["models"]
    assert (found["model_name"], found["state"]) == (HF_REPO, "unverified")


def test_show_tells_files_with_hashes(here: Path) -> None:
    """By name, by alias and by cache id; an unknown one ends with 2 and names what is there."""
    pull(HF_REPO)
    for name in (HF_REPO, HF_REPO.replace("/", "_")):
        (found,) = asked("show", name)["models"]
        assert {file["path"] for file in found["details"]["files"]} >= {"config.json", "model.safetensors"}
    text = invoke("show", HF_REPO).stdout
    assert "model.safetensors" in text
    assert found["path"] in text
    missing = invoke("show", "acme/tinny")
    assert (missing.exit_code, missing.stdout) == (2, "")
    assert HF_REPO in missing.stderr


# --- verify -------------------------------------------------------------------------------------------


def test_verify_finds_a_changed_byte_and_repairs_it(here: Path) -> None:
    """Status 1 and the file's name where one byte differs; --repair fetches it, and then all is well."""
    weights = Path(pull(HF_REPO)) / "model.safetensors"
    assert asked("verify", HF_REPO)["ok"] is True
    stamps = weights.stat()
    weights.resolve().write_bytes(b"?" + WEIGHTS[1:])
    os.utime(weights, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))  # so that only reading it can tell
    found = asked("verify", status=1)
    assert found["ok"] is False
    assert found["models"][0]["findings"] == [{"path": "model.safetensors", "problem": "bytes"}]
    text = invoke("verify")
    assert text.exit_code == 1
    assert "model.safetensors: has other bytes" in text.stdout
    assert "emb-provider verify --repair" in text.stderr
    assert asked("verify", "--repair")["ok"] is True
    assert weights.read_bytes() == WEIGHTS


# --- rm and prune -------------------------------------------------------------------------------------


def test_rm_asks_on_a_terminal_only(here: Path) -> None:
    """Without one it names --yes and removes nothing; --dry-run says what would go."""
    pull(HF_REPO)
    refused = invoke("rm", HF_REPO, stdin="y\n")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--yes" in refused.stderr
    planned = asked("rm", HF_REPO, "--dry-run")
    assert planned["dry_run"] is True
    assert planned["freed"] > len(WEIGHTS)
    assert [one["model_name"] for one in asked("list")["models"]] == [HF_REPO]


def test_rm_asks_and_takes_no_for_an_answer(here: Path, settings: dict[str, str]) -> None:
    """On a terminal it asks, on stderr; after `n` the model is still there, and the exit status is 1."""
    pull(HF_REPO)
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [str(SCRIPT), "rm", HF_REPO],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        os.write(ours, b"n\n")
        out, err = process.communicate(timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (process.returncode, out) == (1, "")
    assert f"Remove {HF_REPO}" in err
    assert [one["model_name"] for one in asked("list")["models"]] == [HF_REPO]


def test_rm_leaves_the_disk_as_it_was(here: Path) -> None:
    """Of a model that was pulled and removed no file is left, in either hub's cache or in ours."""
    before = files_below(here)
    pull(HF_REPO)
    pull(MS_REPO, "--source", "modelscope")
    removed = asked("rm", "-y", HF_REPO, MS_REPO)
    assert [one["model_name"] for one in removed["models"]] == [HF_REPO, MS_REPO]
    assert files_below(here) == before
    assert invoke("rm", "-y", HF_REPO).exit_code == 2


def test_a_model_in_use_stays_and_so_do_the_others(here: Path) -> None:
    """Status 2 and the reason; --wait waits until it is let go, and then it goes, too."""
    pull(HF_REPO)
    pull(MS_REPO, "--source", "modelscope")
    manager = ModelManager(load_settings()[0])
    (entry,) = manager.find(HF_REPO)
    _, hold = manager.acquire(spec_of(load_settings()[0], entry))
    try:
        refused = invoke("rm", "-y", MS_REPO, HF_REPO)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert f"{HF_REPO} is in use" in refused.stderr
        assert len(asked("list")["models"]) == 2
        kept = asked("rm", "-y", "--all", status=2)
        assert [one["model_name"] for one in kept["models"]] == [MS_REPO]
        assert [one["model_name"] for one in kept["kept"]] == [HF_REPO]
        alone = asked("rm", "-y", "--all", status=2)
        assert (alone["dry_run"], alone["models"]) == (False, [])
        assert [one["model_name"] for one in alone["kept"]] == [HF_REPO]
        letting_go = threading.Timer(0.5, hold.release)
        letting_go.start()
        assert invoke("rm", "-y", "--all", "--wait", "600").exit_code == 0
        letting_go.join()
    finally:
        hold.release()
    assert asked("list")["models"] == []


def test_prune_has_nothing_to_do_on_a_clean_disk(here: Path) -> None:
    """It asks nothing then, and says so; what is whole stays."""
    pull(HF_REPO)
    result = invoke("prune")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing to remove" in result.stderr
    assert len(asked("list")["models"]) == 1


def test_prune_clears_parts_away_that_no_list_names(here: Path) -> None:
    """Such as what a killed compile step was making, though no model and no compiled form is to be removed."""
    directory = Path(pull(HF_REPO))
    before = files_below(here)
    half = here / "cache" / "artifacts" / ".0a1b.made.tmp"
    half.mkdir(parents=True)
    (half / "model.bin").write_bytes(b"?" * 1000)
    planned = asked("prune", "--dry-run")
    assert (planned["dry_run"], planned["freed"], half.exists()) == (True, 1000, True)
    pruned = asked("prune")
    assert (pruned["dry_run"], pruned["freed"]) == (False, 1000)
    assert not half.exists()
    assert files_below(here) == before
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS


def test_list_and_rm_work_in_a_pipe(here: Path, settings: dict[str, str]) -> None:
    """`emb-provider list -q | xargs emb-provider rm -y`, as real processes, removes all that is listed."""
    pull(HF_REPO)
    pull(MS_REPO, "--source", "modelscope")
    line = f"{SCRIPT} list -q | xargs {SCRIPT} rm -y"
    done = subprocess.run(["sh", "-c", line], cwd=here, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert asked("list")["models"] == []


# --- as processes -------------------------------------------------------------------------------------


def test_a_closed_stream_breaks_no_command(here: Path) -> None:
    """Without stdin `rm` cannot ask and says so; without stderr `pull` does its work, and prints what was asked for."""
    script = f'"{SCRIPT}" rm {HF_REPO} <&-; echo $?; "{SCRIPT}" pull {HF_REPO} --no-compile -q 2>&-'
    directory = pull(HF_REPO)
    done = subprocess.run(["sh", "-c", script], cwd=here, capture_output=True, encoding="utf-8", check=False)
    assert "--yes" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines() == ["2", directory]
    assert done.returncode == 0


def test_an_interrupted_pull_ends_with_130_and_goes_on(
    tmp_path: Path, settings: dict[str, str], modelscope: ModelScopeServer
) -> None:
    """Ctrl-C in the middle of a file ends at once, says how to go on, and the next pull completes it."""
    modelscope.faults.hold_after["pytorch_model.bin"] = 100_000
    arguments = ("pull", MS_REPO, "--source", "modelscope", "--no-compile", "-q")
    process = subprocess.Popen(
        [str(SCRIPT), *arguments],
        cwd=tmp_path,
        env=environment(tmp_path, **settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        wait_until(lambda: modelscope.bodies()["pytorch_model.bin"] == 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert "The same command goes on with it" in err
    assert "Traceback" not in err
    listed = json.loads(run(tmp_path, "list", "--json", **settings).stdout)["models"]
    assert [one["state"] for one in listed] == ["incomplete"]
    modelscope.faults.hold_after.clear()
    done = run(tmp_path, *arguments, **settings)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "pytorch_model.bin").read_bytes() == WEIGHTS
