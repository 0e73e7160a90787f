"""LiteLLM: its SDK, and its proxy between a client and the service."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from tests.clients.helpers import IGNORE_WARNINGS, KEY, TEXTS, Reference, assert_vectors
from tests.clients.isolated import Environment
from tests.service import free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.service import Service

pytestmark = [pytest.mark.slow, IGNORE_WARNINGS]

PROXY_KEY = "sk-proxy-0123456789"
_START_S = 300.0


@pytest.fixture(scope="module")
def litellm(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    # LiteLLM downloads its table of prices otherwise.
    return Environment("litellm", tmp_path_factory.mktemp("litellm"), {"LITELLM_LOCAL_MODEL_COST_MAP": "True"})


@pytest.fixture(scope="module")
def proxy(litellm: Environment, clients: Service) -> Iterator[str]:
    """Yield the base URL of a proxy process that has the service's model as `mini`."""
    parameters = {"model": "openai/mini", "api_base": f"{clients.url}/v1", "api_key": KEY}
    config = {
        "model_list": [{"model_name": "mini", "litellm_params": parameters}],
        "general_settings": {"master_key": PROXY_KEY},
    }
    path, port = litellm.directory / "config.yaml", str(free_port())
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    url = f"http://127.0.0.1:{port}"
    with (litellm.directory / "proxy.txt").open("w") as log:
        process = subprocess.Popen(
            [litellm.program("litellm"), "--config", path, "--host", "127.0.0.1", "--port", port],
            cwd=litellm.directory,
            env=litellm.variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )

    def is_ready() -> bool:
        assert process.poll() is None, (litellm.directory / "proxy.txt").read_text()[-4000:]
        with suppress(httpx.TransportError):
            return httpx.get(f"{url}/health/liveliness", trust_env=False).status_code == 200
        return False

    try:
        wait_until(is_ready, _START_S)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_sdk(litellm: Environment, clients: Service, reference: Reference) -> None:
    """With each of the providers for servers with the API of OpenAI."""
    expected = reference(*TEXTS)
    for vectors in litellm.run("litellm_sdk", url=clients.url, key=KEY, texts=TEXTS).values():
        assert_vectors(vectors, expected)


def test_openai_through_the_proxy(proxy: str, reference: Reference) -> None:
    """The SDK of OpenAI requests base64 by default, which the proxy passes on."""
    with openai.OpenAI(base_url=proxy, api_key=PROXY_KEY) as client:
        response = client.embeddings.create(model="mini", input=TEXTS)
    assert_vectors([item.embedding for item in response.data], reference(*TEXTS))


@pytest.mark.usefixtures("tiktoken_cl100k")
def test_langchain_through_the_proxy(proxy: str, reference: Reference) -> None:
    """The proxy passes the token ids of LangChain's default on."""
    model = OpenAIEmbeddings(base_url=proxy, api_key=PROXY_KEY, model="mini")
    assert_vectors(model.embed_documents(TEXTS), reference(*TEXTS))
