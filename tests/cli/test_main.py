"""The command line as a whole: help, completion, invalid usage and exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest

from emb_model_provider.cli.main import COMMANDS, MODEL_COMMANDS
from tests.cli.helpers import SCRIPT, invoke, invoke_json, run, run_python
from tests.service import environment

if TYPE_CHECKING:
    from pathlib import Path


def listed_commands(text: str) -> list[str]:
    return [line.split()[0] for line in text.partition("Commands:\n")[2].splitlines()]


def test_help_lists_the_commands(tmp_path: Path) -> None:
    """Every command has a summary that fits into its line."""
    done = run(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert listed_commands(done.stdout) == list(COMMANDS)
    summaries = done.stdout.partition("Commands:\n")[2].splitlines()
    assert all(line.endswith(".") and not line.endswith("...") for line in summaries), "a summary is cut"


def test_help_of_a_command_writes_no_file(tmp_path: Path) -> None:
    done = run(tmp_path, "fidelity", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--precisions", "--source", "--backend", "--device", "--rounds", "--json"):
        assert option in done.stdout
    assert "fp32,bf16,fp16,int8,int4" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_models_has_the_same_commands() -> None:
    """`models list` is `list`, and so on."""
    assert listed_commands(invoke("models", "--help").stdout) == list(MODEL_COMMANDS)
    for name in MODEL_COMMANDS:
        _, _, direct = invoke(name, "--help").stdout.partition("\n")
        _, _, in_group = invoke("models", name, "--help").stdout.partition("\n")
        assert direct == in_group


BATCH_COMMANDS = [f"batches {name}" for name in ("list", "show", "cancel", "run")]


@pytest.mark.parametrize(
    "name", [*sorted(set(COMMANDS) - {"serve", "models", "completion", "batches"}), *BATCH_COMMANDS]
)
def test_every_command_has_json_output_and_documents_it(name: str) -> None:
    text = invoke(*name.split(), "--help").stdout
    assert "--json" in text
    assert "JSON: " in text or "one object per line: index, text," in text


def test_help_imports_no_heavy_package(tmp_path: Path) -> None:
    """So that help is printed at once."""
    program = (
        "import sys\n"
        "from emb_model_provider.cli.main import COMMANDS, main\n"
        "for arguments in (['--help'], *([name, '--help'] for name in COMMANDS)):\n"
        "    main(arguments, standalone_mode=False)\n"
        "heavy = {'torch', 'openvino', 'transformers', 'sentence_transformers', 'numpy', 'pydantic', 'httpx', 'tqdm',\n"
        "         'psutil', 'huggingface_hub', 'modelscope_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = run_python(tmp_path, program)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_can_be_run_as_a_module(tmp_path: Path) -> None:
    """As `python -m emb_model_provider`, for scripts that are not on PATH."""
    command = [sys.executable, "-m", "emb_model_provider", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: emb-provider ")


# --- completion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    """Only the script is on stdout. How to install it is on stderr."""
    result = invoke("completion", shell)
    assert result.exit_code == 0
    assert "_EMB_PROVIDER_COMPLETE" in result.stdout
    assert f"emb-provider completion {shell} --install" in result.stderr


@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", ".local/share/bash-completion/completions/emb-provider"),
        ("zsh", ".zfunc/_emb-provider"),
        ("fish", ".config/fish/completions/emb-provider.fish"),
    ],
)
def test_completion_can_be_installed(shell: str, file: str, here: Path) -> None:
    """Where the shell looks for it, in directories that need not exist. bash accepts the script."""
    result = invoke("completion", shell, "--install")
    path = here / "home" / file
    assert (result.exit_code, result.stdout) == (0, "")
    assert str(path) in result.stderr
    assert path.read_text(encoding="utf-8") == invoke("completion", shell).stdout.removesuffix("\n")
    if shell == "bash" and (bash := shutil.which("bash")) is not None:
        done = subprocess.run(
            [bash, "-c", f". '{path}' && complete -p emb-provider"], capture_output=True, encoding="utf-8", check=True
        )
        assert "emb-provider" in done.stdout


@pytest.mark.parametrize(("words", "expected"), [("emb-provider pru", "prune"), ("emb-provider show my", "my-model")])
def test_completion_completes_commands_and_models(words: str, expected: str, tmp_path: Path) -> None:
    variables = {
        "_EMB_PROVIDER_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [str(SCRIPT)],
        cwd=tmp_path,
        env=environment(tmp_path, MODEL_MAPPING='{"my-model": {"name": "a/b"}}') | variables,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.stdout.split() == [f"plain,{expected}"], done.stderr


# --- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (("pull", "a/b", "c/d", "--revision", "x"), "ID@REV"),
        (("pull", "a/b@x", "--revision", "y"), "both name a revision"),
        (("load", "a/b@x", "--revision", "y"), "both name a revision"),
        (("pull", "a/b", "c/d", "--to", "x"), "--to requires exactly one ID"),
        (("rm",), "--all"),
        (("rm", "--all", "a/b"), "--all"),
        (("rm", "--all", "--source", "modelscope"), "--all cannot be combined with --source"),
        (("rm", "a/b", "-y", "--url", "http://127.0.0.1:1"), "--url requires --unload"),
        (("embed",), "TEXT"),
        (("embed", "-", "-"), "only once"),
        (("embed", "@nowhere.txt"), "no such file"),
        (("fidelity", "model", "--precisions", "fp32,fp31"), "fp31: choose from fp32, bf16, fp16, int8, int4"),
        (("fidelity", "model", "--precisions", ","), "the list is empty: choose from fp32"),
        (("fidelity", "model", "--rounds", "0"), "--rounds"),
        (("fidelity",), "MODEL"),
        (("models", "serve"), "No such command"),
        (("show", ""), "empty"),
        (("fidelty",), "Did you mean 'fidelity'?"),
        (("ls",), "Did you mean 'list'?"),
        (("remove", "a/b"), "Did you mean 'rm'?"),
        (("models", "lst"), "Did you mean 'list'?"),
        (("models", "run"), "No such command 'run'."),
        (("help",), "Did you mean '--help'?"),
        (("frobnicate",), "No such command 'frobnicate'."),
    ],
)
def test_invalid_usage_exits_with_2(arguments: tuple[str, ...], phrase: str, here: Path) -> None:
    """Stderr says what is wrong. Stdout is empty, and nothing is downloaded."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert phrase in result.stderr
    assert not (here / "hf").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (("show", "acme/none", "--json"), "not_cached", 2),
        (("show", "--json"), "invalid_usage", 2),
        (("shwo", "--json"), "invalid_usage", 2),
        (("models", "show", "acme/none", "--json"), "not_cached", 2),
        (("rm", "acme/none", "--json"), "not_cached", 2),
        (("pull", "acme/none", "--json", "--no-compile"), "repository_not_found", 2),
        (("ps", "--url", "http://127.0.0.1:9", "--json"), "server_unreachable", 3),
        (("ps", "--url", "nonsense", "--json"), "invalid_usage", 2),
    ],
)
def test_a_failure_with_json_is_json(arguments: tuple[str, ...], code: str, exit_code: int, here: Path) -> None:
    """On stdout, with the message that is on stderr."""
    result = invoke(*arguments)
    error = json.loads(result.stdout)["error"]
    assert (error["code"], result.exit_code) == (code, exit_code)
    assert error["message"] in result.stderr


def test_failures_of_several_models_are_in_the_json(here: Path) -> None:
    pulled = invoke_json("pull", "acme/none", "acme/tiny", "--no-compile", status=2)
    assert [model["alias"] for model in pulled["models"]] == ["acme/tiny"]
    assert [(each["alias"], each["error"]["code"]) for each in pulled["failed"]] == [
        ("acme/none", "repository_not_found")
    ]


def test_an_invalid_setting_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "list", FIDELITY_FLOORS="high", OFFLINE="true")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: EMB_PROVIDER_FIDELITY_FLOORS")


def test_a_home_directory_that_does_not_exist_is_one_line(here: Path) -> None:
    result = invoke("pull", "~nobody-of-this-name/model", "--no-compile")
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")


def test_an_interrupt_before_the_command_begins_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """Click alone would exit with 1."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(click.Group, "parse_args", interrupt)
    result = invoke("list")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_commands_work_without_standard_streams(here: Path) -> None:
    """Without stdin, `rm` cannot ask. Without stderr, `pull` still prints its result."""
    pull = ("pull", "acme/tiny", "--no-compile", "-q")
    directory = invoke(*pull).stdout.strip()
    script = f'"{SCRIPT}" rm acme/tiny <&-; echo $?; "{SCRIPT}" {" ".join(pull)} 2>&-'
    done = subprocess.run(["sh", "-c", script], cwd=here, capture_output=True, encoding="utf-8", check=False)
    assert "--yes" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines() == ["2", directory]
    assert done.returncode == 0
