"""LangChain's OpenAIEmbeddings with its defaults, which send token ids of OpenAI."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from langchain_openai import OpenAIEmbeddings

from tests.clients.helpers import IGNORE_WARNINGS, KEY, TEXTS, Reference, assert_vectors
from tests.clients.isolated import SCRIPTS, Environment

if TYPE_CHECKING:
    from pathlib import Path

    from tests.service import Service

pytestmark = [pytest.mark.slow, IGNORE_WARNINGS]


@pytest.fixture(scope="module")
def langchain(clients: Service, tmp_path_factory: pytest.TempPathFactory, tiktoken_cache: str) -> Environment:
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": f"{clients.url}/v1", "TIKTOKEN_CACHE_DIR": tiktoken_cache}
    return Environment("langchain", tmp_path_factory.mktemp("langchain"), variables)


@pytest.mark.usefixtures("tiktoken_cl100k")
async def test_base_url(clients: Service, reference: Reference) -> None:
    """The vectors are those of the texts, also without tokens, with both clients and in several requests."""
    texts = [*TEXTS, "", *(f"text {number}" for number in range(120))]
    model = OpenAIEmbeddings(base_url=f"{clients.url}/v1", api_key=KEY, model="mini", chunk_size=50)
    assert_vectors(model.embed_documents(texts), reference(*texts))
    assert_vectors(await model.aembed_documents(texts), reference(*texts))


def test_defaults(langchain: Environment, reference: Reference) -> None:
    """`OpenAIEmbeddings()` and `init_embeddings("openai:...")` with environment variables only."""
    expected = reference(*TEXTS)
    for vectors in langchain.run("langchain_defaults", texts=TEXTS).values():
        assert_vectors(vectors, expected)


def test_standard_tests(langchain: Environment, tmp_path: Path) -> None:
    """LangChain's own tests of embeddings pass."""
    shutil.copy(
        SCRIPTS / "langchain_standard.py", tmp_path / "test_standard.py"
    )  # away from the project's configuration
    run = subprocess.run(
        [langchain.program("python"), "-m", "pytest", "-q", "-o", "asyncio_mode=auto"],
        cwd=tmp_path,
        env=langchain.variables,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "5 passed" in run.stdout
