"""The commands of the guide, pasted as they stand, and the scripts behind them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.docs.markdown import ROOT, blocks
from tests.service import environment
from tests.transfer.helpers import TOKEN, mirrored, model_files
from tests.transfer.servers import DestinationServer, SourceServer

if TYPE_CHECKING:
    from collections.abc import Iterator

GUIDE = ROOT / "docs" / "HF-to-ModelScope-Transfer.md"
MODELS = ("BAAI/bge-small-zh-v1.5", "sentence-transformers/all-MiniLM-L6-v2")
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def source() -> Iterator[SourceServer]:
    with SourceServer({name: model_files(number) for number, name in enumerate(MODELS)}) as server:
        yield server


@pytest.fixture
def destination() -> Iterator[DestinationServer]:
    # `test` looks for a public model of ModelScope.
    with DestinationServer({"iic/nlp_gte_sentence-embedding_chinese-small": {}}, token=TOKEN) as server:
        yield server


@pytest.fixture
def variables(tmp_path: Path, source: SourceServer, destination: DestinationServer) -> dict[str, str]:
    """Return the environment of a user who has set the variables that the hubs' own clients read."""
    return environment(tmp_path) | {
        "HF_ENDPOINT": source.url,
        "HF_TOKEN": "hf-s3cret",
        "MODELSCOPE_ENDPOINT": destination.url,
        "MODELSCOPE_API_TOKEN": TOKEN,
        "MODELSCOPE_API_MAX_RETRIES": "1",
        "HOME": str(tmp_path / "home"),
        "NO_PROXY": "localhost,127.0.0.1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DELAY": "0",
    }


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a working directory with the scripts and the list, like a clone."""
    directory = tmp_path / "clone"
    directory.mkdir()
    for name in ("scripts", "examples"):
        (directory / name).symlink_to(ROOT / name)
    return directory


def run(clone: Path, variables: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=clone, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def bash(clone: Path, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(clone, variables, "bash", *arguments)


@pytest.mark.slow
def test_the_commands_of_the_guide_work_as_they_stand(
    clone: Path, variables: dict[str, str], source: SourceServer, destination: DestinationServer
) -> None:
    """All blocks in their order, with the settings of a user who has logged in. All models arrive, also in Python."""
    commands = [block for block in blocks(GUIDE) if block.language in ("bash", "python")]
    assert len(commands) >= 8
    for block in commands:
        program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        done = run(clone, variables, *program, block.text)
        assert done.returncode == 0, (str(block), done.stdout, done.stderr)
    for name in ("bge-small-zh-v1.5", "bge-private", "bge-spooled", "bge-from-python"):
        assert mirrored(source, destination, MODELS[0], f"your-org/{name}")
    assert mirrored(source, destination, MODELS[1], "your-org/all-MiniLM-L6-v2")
    assert "First version" in [commit["message"] for commit in destination.commits]
    assert list((clone / "spool").iterdir()) == [] if (clone / "spool").exists() else True
    assert (clone / "bge-small-zh" / "config.json").read_bytes() == source.repos[MODELS[0]]["config.json"]
    assert (clone / "out.json").exists()


def test_scripts_pass_on_exit_codes(
    clone: Path, variables: dict[str, str], source: SourceServer, destination: DestinationServer
) -> None:
    """1: something differs or failed; 2: not found. A list continues after a failure, and counts."""
    full = (
        "scripts/hf_to_modelscope_transfer.py",
        "--hf-model",
        MODELS[0],
        "--ms-model",
        "your-org/x",
        "--verify-only",
    )
    assert run(clone, variables, sys.executable, *full).returncode == 1
    simple = run(clone, variables, sys.executable, "scripts/simple_hf_to_ms.py", "acme/none", "your-org/x")
    assert (simple.returncode, "acme/none" in simple.stderr) == (2, True)
    (clone / "list.txt").write_text(f"# 注释\nacme/none your-org/none\n\n{MODELS[1]} your-org/y\n")
    for script in (["scripts/batch_transfer.sh"], ["scripts/quick_start_transfer.sh", "batch"]):
        batch = bash(clone, variables, *script, "list.txt")
        assert (batch.returncode, "1 succeeded, 1 failed" in batch.stderr) == (1, True), batch.stderr
    assert mirrored(source, destination, MODELS[1], "your-org/y")


@pytest.mark.parametrize(
    "command",
    [
        ("python", "scripts/hf_to_modelscope_transfer.py", "--hf-model", "a/b"),
        ("python", "scripts/simple_hf_to_ms.py", "a/b"),
        ("bash", "scripts/batch_transfer.sh"),
        ("bash", "scripts/batch_transfer.sh", "none.txt"),
        ("bash", "scripts/quick_start_transfer.sh"),
        ("bash", "scripts/quick_start_transfer.sh", "transfer", "a/b"),
        ("bash", "scripts/quick_start_transfer.sh", "start"),
    ],
    ids=" ".join,
)
def test_invalid_usage_of_scripts_exits_with_2(
    command: tuple[str, ...], clone: Path, variables: dict[str, str]
) -> None:
    done = run(clone, variables, *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr


def test_the_token_of_the_command_line_is_used(
    clone: Path, variables: dict[str, str], source: SourceServer, destination: DestinationServer
) -> None:
    """`--hf-token` and the third argument take precedence over the variables, and are not shown."""
    source.token = "hf-other"
    full = ("--hf-model", MODELS[0], "--ms-model", "your-org/z")
    script = "scripts/hf_to_modelscope_transfer.py"
    refused = run(clone, variables, sys.executable, script, *full)
    assert (refused.returncode, "hf-s3cret" in refused.stderr) == (2, False)
    accepted = run(clone, variables, sys.executable, script, *full, "--hf-token", "hf-other", "--log-level", "DEBUG")
    assert (accepted.returncode, "hf-other" in accepted.stderr + accepted.stdout) == (0, False)
    short = ("scripts/simple_hf_to_ms.py", MODELS[0], "your-org/short", "hf-other")
    assert run(clone, variables, sys.executable, *short).returncode == 0


@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").exists(), reason="there is no .venv")
def test_scripts_find_what_setup_has_installed(
    clone: Path, variables: dict[str, str], source: SourceServer, destination: DestinationServer
) -> None:
    """Also if `python` is another Python than that of the project."""
    python = Path(sys.base_prefix) / "bin" / "python3"
    done = run(clone, variables, str(python), "scripts/simple_hf_to_ms.py", MODELS[0], "your-org/found")
    assert done.returncode == 0, done.stderr
    assert mirrored(source, destination, MODELS[0], "your-org/found")


def test_scripts_without_the_package_say_what_to_do(clone: Path, variables: dict[str, str]) -> None:
    """Without this project, uv and pip, each script names `setup`."""
    bare = variables | {"PATH": "/usr/bin:/bin"}
    python = run(clone, bare, sys.executable, "-I", "-S", "scripts/simple_hf_to_ms.py", "a/b", "c/d")
    assert (python.returncode, "quick_start_transfer.sh setup" in python.stderr) == (1, True)
    shell = bash(clone, bare, "scripts/batch_transfer.sh", "list.txt")
    assert (shell.returncode, "quick_start_transfer.sh setup" in shell.stderr) == (2, True)
