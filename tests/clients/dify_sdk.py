"""Embeds texts with the model class of Dify's plugin SDK, and prints JSON. Runs in an environment of its own."""

from __future__ import annotations

import json
import sys
from typing import Any

from dify_plugin.entities.model import EmbeddingInputType
from dify_plugin.errors.model import CredentialsValidateFailedError
from dify_plugin.interfaces.model.openai_compatible.text_embedding import OAICompatEmbeddingModel


class Model(OAICompatEmbeddingModel):
    """The class as the plugin OpenAI-API-compatible derives it."""

    def _get_num_tokens_by_gpt2(self, text: str) -> int:
        return len(text) // 4  # the plugin's estimate where the vocabulary of GPT-2 cannot be downloaded


def main(url: str, key: str, texts: list[str]) -> dict[str, Any]:
    """Return vectors by URL, those of a query, and the error for an unknown model."""
    model = Model([])
    credentials = {"api_key": key, "context_size": "256", "max_chunks": "8"}
    vectors = {}
    for path in ("/v1", "/v1/", "", "/v1/embeddings"):
        credentials["endpoint_url"] = url + path
        model.validate_credentials("mini", credentials)
        vectors[path] = model.invoke("mini", credentials, texts, user="a-user").embeddings
    query = model.invoke("mini-query", credentials, texts[:1], input_type=EmbeddingInputType.QUERY)
    try:
        model.validate_credentials("nope", credentials)
    except CredentialsValidateFailedError as error:
        return {"vectors": vectors, "query": query.embeddings, "tokens": query.usage.tokens, "error": str(error)}
    raise AssertionError("the credentials of an unknown model are valid")


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))  # noqa: T201
