"""Run the script of docs/managing.md as a user would, against local hub servers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.backends.small_tokenizers import wordpiece
from tests.docs.markdown import ROOT, blocks
from tests.hubs.servers import HuggingFaceServer, ModelScopeServer
from tests.models import bert, gte_configuration, save_modelscope, save_st
from tests.service import environment, free_port

if TYPE_CHECKING:
    from collections.abc import Mapping

GTE = "iic/nlp_gte_sentence-embedding_chinese-small"
BGE = "BAAI/bge-small-zh-v1.5"
OTHER = "acme/other"
QWEN = "Qwen/Qwen3-Embedding-0.6B"


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def content(directory: Path) -> Mapping[str, str]:
    """Return each file below a directory with its hash, and each link with its target; not the lock files, which stay."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file() and path.suffix in {".lock", ".hold"}:
            assert not path.stat().st_size, name
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("name", ["managing.md", "managing.zh-CN.md"])
def test_python_block_removes_what_it_has_downloaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The block runs unchanged; the model stays usable after its files were removed."""
    (program,) = [block.text for block in blocks(ROOT / "docs" / name) if "get_model_manager" in block.text]
    files = files_of(save_st(tmp_path / "made", bert, wordpiece(), pooling="cls"))
    monkeypatch.chdir(tmp_path)
    with ModelScopeServer({QWEN: files}) as hub:
        variables = environment(
            tmp_path, MODELSCOPE_ENDPOINT=hub.url, MODELSCOPE_CACHE_DIR=str(tmp_path / "ms"), DEVICE="cpu"
        )
        for variable in [variable for variable in os.environ if variable not in variables]:
            monkeypatch.delenv(variable)
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        names: dict[str, Any] = {}
        exec(compile(program, name, "exec"), names)  # noqa: S102 - a block of our own document
    assert f"{QWEN}: 0.00 GB" in capsys.readouterr().out
    assert names["manager"].list() == []
    assert names["model"].encode(["hello"]).shape == (1, 48)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_script_restores_the_caches(tmp_path: Path) -> None:
    """The script removes all files of the two models that it downloads, and no file of another model."""
    (script,) = (block for block in blocks(ROOT / "docs" / "managing.md") if block.mark == "script")
    gte = files_of(save_modelscope(tmp_path / "made" / "gte", gte_configuration()))
    bge = files_of(save_st(tmp_path / "made" / "bge", bert, wordpiece(), pooling="cls"))
    other = {**bge, "README.md": b"# Another digest, therefore another artifact\n"}
    caches = tmp_path / "caches"
    for name in ("own", "modelscope", "huggingface"):
        (caches / name).mkdir(parents=True)
    port = free_port()
    with ModelScopeServer({GTE: gte}) as modelscope, HuggingFaceServer({BGE: bge, OTHER: other}) as huggingface:
        environ = environment(
            tmp_path,
            CACHE_DIR=str(caches / "own"),
            MODELSCOPE_CACHE_DIR=str(caches / "modelscope"),
            HF_CACHE_DIR=str(caches / "huggingface"),
            MODELSCOPE_ENDPOINT=modelscope.url,
            HF_ENDPOINT=huggingface.url,
            PORT=str(port),
            LOG_DIR=str(tmp_path / "logs"),
        )
        environ |= {"NO_PROXY": "localhost", "HOME": str(tmp_path)}
        environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
        subprocess.run(
            ["emb-provider", "pull", "--no-compile", OTHER], cwd=tmp_path, env=environ, timeout=120, check=True
        )
        before = content(caches)
        assert before
        script_text = script.text.replace("localhost:9000", f"localhost:{port}")
        with subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script_text],
            cwd=tmp_path,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as running:
            try:
                output, _ = running.communicate(timeout=500)
            finally:
                # If the script fails, its service is still running.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, output
    assert GTE in output
    assert BGE in output
    assert content(caches) == before
