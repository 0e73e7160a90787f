"""The command line, as real processes: what it prints, and what it ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import click
import pytest

from emb_model_provider.cli import fidelity as start_fidelity_worker
from emb_model_provider.cli.fidelity import _cells, _notes
from emb_model_provider.cli.main import COMMANDS, OF_MODELS
from tests.cli.running import SCRIPT, invoke
from tests.cli.running import run as run_command
from tests.service import environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Compiled

PRECISIONS = ("fp32", "int8")


def run(directory: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `emb-provider` as a user does, with a cache of its own in `directory` and no hub to ask."""
    return run_command(directory, *arguments, **{"OFFLINE": "true", **settings})


def rows_of(table: str) -> dict[str, list[str]]:
    """Return the cells of a table's rows, by their first; the head's is `precision`."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    return {first: rest for first, *rest in cells}


@pytest.fixture(scope="module")
def place(compiled: Compiled) -> Path:
    """Return a directory with a small model, `model`, and a cache that the commands share: it is compiled at fp32."""
    return compiled.directory


# --- help ---------------------------------------------------------------------------------------------------------


def test_help_names_the_commands(tmp_path: Path) -> None:
    """Each with a line that says what it does; exit status 0, and nothing on stderr."""
    done = run(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    listed = done.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed), "cut short"


def test_help_of_a_command_names_its_options(tmp_path: Path) -> None:
    """`fidelity --help` says what may be chosen; no file is written for it."""
    done = run(tmp_path, "fidelity", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--precisions", "--source", "--backend", "--device", "--rounds", "--json"):
        assert option in done.stdout
    assert "fp32,bf16,fp16,int8,int4" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_models_has_the_same_commands() -> None:
    """`models list` is `list`, and so on: one table, two names."""
    listed = invoke("models", "--help").stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(OF_MODELS)
    for name in OF_MODELS:
        options = [invoke(*words, name, "--help").stdout.partition("\n")[2] for words in ((), ("models",))]
        assert options[0] == options[1]


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"serve", "models", "completion"}))
def test_every_command_has_json_and_says_of_what_form(name: str) -> None:
    """`--json`, and the help names the keys."""
    text = invoke(name, "--help").stdout
    assert "--json" in text
    assert "JSON: " in text or "An object a line: index, text, embedding." in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    """The script is on stdout alone; how to install it is on stderr."""
    result = invoke("completion", shell)
    assert result.exit_code == 0
    assert "_EMB_PROVIDER_COMPLETE" in result.stdout
    assert f"emb-provider completion {shell} >" in result.stderr


def test_completion_knows_commands_and_models(tmp_path: Path) -> None:
    """A shell that asks gets the commands, and behind them the configured models' names."""
    asking = environment(tmp_path, MODEL_MAPPING='{"my-model": {"name": "a/b"}}')
    for words, expected in (("emb-provider pru", "prune"), ("emb-provider show my", "my-model")):
        done = subprocess.run(
            [str(SCRIPT)],
            cwd=tmp_path,
            env=asking
            | {
                "_EMB_PROVIDER_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
            },
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert done.stdout.split() == [f"plain,{expected}"], done.stderr


def test_help_imports_no_runtime(tmp_path: Path) -> None:
    """Nothing that takes long to import, of any command's: help is there at once."""
    program = (
        "import sys\n"
        "from emb_model_provider.cli.main import main\n"
        "from emb_model_provider.cli.main import COMMANDS\n"
        "for arguments in (['--help'], *([name, '--help'] for name in COMMANDS)):\n"
        "    main(arguments, standalone_mode=False)\n"
        "heavy = {'torch', 'openvino', 'transformers', 'sentence_transformers', 'numpy', 'pydantic', 'httpx',\n"
        "         'huggingface_hub', 'modelscope_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fidelity", "model", "--precisions", "fp32,fp31"), "fp31: choose of fp32, bf16, fp16, int8, int4"),
        (("fidelity", "model", "--precisions", ","), "nothing: choose of fp32"),
        (("fidelity", "model", "--rounds", "0"), "--rounds"),
        (("fidelity",), "MODEL"),
        (("fidelty",), "fidelty"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    """A word on stderr says what was wrong and what there is; stdout stays empty."""
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_a_directory_that_is_not_there_is_one_line(as_json: bool, tmp_path: Path) -> None:
    """Exit status 2, for nothing can be asked of it; the reason once, on stderr, and no table."""
    missing = str(tmp_path / "nowhere" / "model")
    options = ("--json",) if as_json else ()
    done = run(tmp_path, "fidelity", missing, "--precisions", "fp32,int8", "--rounds", "1", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = [
        line for line in (done.stdout + done.stderr).splitlines() if missing in line and "exist" in line
    ]
    assert f"The model directory {missing} does not exist" in line


def test_a_wrong_setting_is_one_line(tmp_path: Path) -> None:
    """What is wrong in the environment or in .env is said without a traceback, by its name."""
    done = run(tmp_path, "fidelity", "model", "--precisions", "fp32", "--rounds", "1", FIDELITY_FLOORS="high")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr + done.stdout
    assert "EMB_PROVIDER_FIDELITY_FLOORS" in done.stderr + done.stdout


def test_a_precision_that_is_not_possible_says_why_in_its_row(place: Path) -> None:
    """Every row has its reason, and with none that is possible the exit status is 1."""
    impossible = ("--backend", "openvino", "--device", "cuda", "--precisions", ",".join(PRECISIONS))
    done = run(place, "fidelity", "model", "--rounds", "1", *impossible)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    rows = rows_of(done.stdout)
    for precision in PRECISIONS:
        assert rows[precision][0].startswith("not possible: EMB_PROVIDER_BACKEND=openvino serves on the CPU")


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.02, 0.1, 2.0])
def test_an_interrupt_ends_with_130_and_takes_its_processes_along(place: Path, after_s: float) -> None:
    """Ctrl-C reaches the whole group: one word on stderr, no traceback, and nothing goes on computing."""
    process = subprocess.Popen(
        [str(SCRIPT), "fidelity", "model", "--precisions", "fp32", "--rounds", "100", "--device", "cpu"],
        cwd=place,
        env=environment(place, OFFLINE="true"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    assert process.stderr is not None
    assert any("fp32: preparing" in line for line in process.stderr)  # reads until there is one
    time.sleep(after_s)  # while a process is started, while it imports, while it computes
    os.killpg(process.pid, signal.SIGINT)
    # Whatever was started holds the same stderr: this returns when the last of them has ended.
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.rstrip().endswith("interrupted")
    assert "Traceback" not in err


def test_an_interrupt_before_the_command_begins_ends_with_130_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the command line is read, which click alone would call a failure, with status 1."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(click.Group, "parse_args", interrupt)
    result = invoke("list")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_what_was_not_measured_has_no_figures() -> None:
    """fp32 in torch is the reference; another precision without a figure must not look as true as that."""
    row = {"computed": "fp32", "backend": "torch", "fidelity": None, "disk_bytes": 1, "resident_bytes": 1}
    row |= {"peak_bytes": 1, "load_s": 1, "short_texts_per_s": 1, "short_ratio": 1}
    row |= {"doc_texts_per_s": 1, "doc_ratio": 1}
    assert _cells("fp32", {**row, "precision": "fp32"})[2:6] == ("1.00000",) * 4
    assert _cells("int8", {**row, "precision": "int8"})[2:6] == ("-",) * 4


def test_a_row_below_its_floor_says_that_it_would_not_be_served() -> None:
    """The command measures it all the same, and what else is noted stays."""
    row = {"fidelity": {"min_cosine": 0.89}, "floor": 0.9, "notes": ["a note"]}
    assert _notes(row) == ["a note", "not served: below its floor of 0.9 (EMB_PROVIDER_FIDELITY_FLOORS)"]
    assert _notes({**row, "floor": 0.89}) == ["a note"]
    assert _notes({"error": "not possible"}) == []


def test_a_process_that_dies_has_its_reason_for_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that memory was too short for does not take the other rows along."""
    monkeypatch.setattr(
        start_fidelity_worker, "COMMAND", (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    )
    with start_fidelity_worker.start_fidelity_worker({"model": "x"}) as died:
        assert "memory was short" in died.loaded["error"]


# --- what is measured ---------------------------------------------------------------------------------------------


def measured(place: Path, precisions: str, *options: str) -> subprocess.CompletedProcess[str]:
    done = run(
        place, "fidelity", "model", "--precisions", precisions, "--rounds", "1", "--device", "cpu", *options
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_model_is_measured_at_each_precision(place: Path) -> None:
    """JSON on stdout alone has the figures of each, and a table has a row for what is compiled by now."""
    found = json.loads(measured(place, "fp32,int8", "--json").stdout)
    assert found["model"] == "model"
    assert set(found["about"]) == {"machine", "versions", "date"}
    rows: dict[str, dict[str, Any]] = found["precisions"]
    assert tuple(rows) == PRECISIONS
    for precision, row in rows.items():
        assert (row["precision"], row["backend"], row["device"]) == (precision, "openvino", "cpu")
        assert row["fidelity"]["texts"] > 300
        assert 0.5 < row["fidelity"]["min_cosine"] <= row["fidelity"]["mean_cosine"] <= 1.000001
        for figure in (
            "disk_bytes",
            "load_s",
            "short_texts_per_s",
            "doc_texts_per_s",
            "short_ratio",
            "doc_ratio",
        ):
            assert row[figure] > 0, figure
    assert rows["fp32"]["fidelity"]["min_cosine"] >= 0.999
    assert (rows["fp32"]["short_ratio"], rows["fp32"]["doc_ratio"]) == (1, 1)
    assert rows["int8"]["fidelity"]["min_cosine"] < rows["fp32"]["fidelity"]["min_cosine"]
    assert rows["int8"]["disk_bytes"] < rows["fp32"]["disk_bytes"]

    done = measured(place, "int8")
    assert "compiling" not in done.stderr
    table = rows_of(done.stdout)
    assert {"precision", "int8"} <= set(table)
    assert {len(cells) for cells in table.values()} == {13}
    assert table["int8"][0].endswith(" (openvino)")
    assert float(table["int8"][1]) == pytest.approx(rows["int8"]["fidelity"]["min_cosine"], abs=2e-5)
    assert "versions: Python" in done.stdout
