"""Run the examples marked `<!-- run -->` against the real service, and read those marked `<!-- env -->`."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.settings.loading import load_settings
from tests.docs.markdown import DOCUMENTS, ROOT, Block, blocks
from tests.service import Service, environment, wait_until

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


def runnable() -> list[tuple[Block, Block | None]]:
    examples: dict[str, tuple[Block, Block | None]] = {}
    for document in DOCUMENTS:
        all_blocks = [*blocks(document), None]
        for block, following in itertools.pairwise(all_blocks):
            if block is not None and block.mark == "run":
                output = following if following is not None and following.mark == "output" else None
                examples.setdefault(block.text + (output.text if output else ""), (block, output))
    return list(examples.values())


def env_blocks() -> list[Block]:
    return [block for document in DOCUMENTS for block in blocks(document) if block.language == "env"]


@pytest.mark.parametrize(("example", "shown"), runnable(), ids=lambda block: str(block or "-"))
def test_example_runs(
    example: Block, shown: Block | None, service: Service, service_cache: str, tmp_path: Path
) -> None:
    """The exit code is 0 and the output is the one in the document, where `…` matches any text."""
    if example.language == "bash" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = example.text.replace("localhost:9000", f"localhost:{service.port}")
    done = subprocess.run(
        [*COMMANDS[example.language], text],
        cwd=tmp_path,
        env=environment(tmp_path, CACHE_DIR=service_cache) | {"NO_PROXY": "localhost"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if shown is not None:
        assert re.fullmatch(pattern(shown.text), done.stdout.strip()), done.stdout
    else:
        assert '"error":{' not in done.stdout, done.stdout


def pattern(shown: str) -> str:
    return ".*".join(re.escape(part) for part in shown.strip().split("…"))


@pytest.mark.parametrize("block", env_blocks(), ids=str)
def test_settings_example_is_read(block: Block, tmp_path: Path) -> None:
    """As the content of `.env`, the example causes no error and no warning."""
    (tmp_path / ".env").write_text(block.text, encoding="utf-8")
    settings, warnings = load_settings(tmp_path / ".env", {})
    assert warnings == []
    assert settings.model_fields_set


@pytest.mark.slow
def test_first_start_logs_the_lines_of_the_readme(tmp_path: Path) -> None:
    """Numbers and the precision differ between machines; a slow machine logs the progress of compiling in between."""
    (block,) = (block for block in blocks(ROOT / "README.md") if block.mark == "startup")
    settings = {"LOG_FORMAT": "text", "CACHE_DIR": str(tmp_path / "cache"), "TORCH_WHILE_COMPILING": "true"}
    with Service(tmp_path, **settings) as service:
        service.wait()
        wait_until(lambda: service.http.get("/v1/models").json()["data"][0]["backend"] == "openvino", 560)
        text = service.log_text().replace(f"localhost:{service.port}", "localhost:9000")
    logged = [variable(re.sub(r"^\S+ \S+ ", "", line)) for line in text.splitlines()]
    shown = [variable(line) for line in block.text.splitlines()]
    later = iter(logged)
    assert [line for line in shown if line not in later] == []  # in this order


def variable(line: str) -> str:
    """Replace what differs between machines."""
    line = re.sub(r"(?<![\w:-])\d+(\.\d+)?( [MG]B\b)?", "#", line)
    return re.sub(r"\b(bf16|fp32)\b", "#", line)


def test_examples_are_found() -> None:
    """The examples include those of the README: curl, OpenAI's client, LangChain and `.env`."""
    texts = [block.text for block, _ in runnable() if block.document == "README.md"]
    assert any(text.startswith("curl ") for text in texts)
    assert any("from openai import" in text for text in texts)
    assert any("check_embedding_ctx_length=False" in text for text in texts)
    assert len(runnable()) >= 10
    assert len(env_blocks()) >= 10
