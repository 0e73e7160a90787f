"""Ranks documents with the model class of Dify's plugin SDK, and prints JSON. Runs in an environment of its own."""

from __future__ import annotations

import json
import sys
from typing import Any

from dify_plugin.errors.model import CredentialsValidateFailedError
from dify_plugin.interfaces.model.openai_compatible.rerank import OAICompatRerankModel


def main(url: str, key: str, query: str, documents: list[str]) -> dict[str, Any]:
    """Return the documents and scores by URL, and the error for an unknown model."""
    model = OAICompatRerankModel([])
    credentials = {"api_key": key}
    rankings = {}
    for path in ("/v1", "/v1/", "", "/v1/rerank"):
        credentials["endpoint_url"] = url + path
        model.validate_credentials("reranker", credentials)
        found = model.invoke("reranker", credentials, query, documents)
        rankings[path] = [[each.index, each.score] for each in found.docs]
        assert all(each.text == documents[each.index] for each in found.docs)
    try:
        model.validate_credentials("nope", credentials)
    except CredentialsValidateFailedError as error:
        return {"rankings": rankings, "error": str(error)}
    raise AssertionError("the credentials of an unknown model are valid")


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))  # noqa: T201
