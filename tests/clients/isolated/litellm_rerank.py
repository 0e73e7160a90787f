"""LiteLLM's SDK for rerankers, with the providers that a user may choose for a server of their own."""

import asyncio
import json
import os
import sys

import litellm

call = json.load(sys.stdin)
url, documents = call["url"], call["documents"]
os.environ["INFINITY_API_KEY"] = os.environ["DASHSCOPE_API_KEY"] = call["key"]
options = {"query": call["query"], "documents": documents, "api_key": call["key"]}
bases = {
    "cohere": "",
    "jina_ai": "",
    "huggingface": "",
    "infinity": "",
    "hosted_vllm": "/v1",
    "voyage": "/v1",
    "dashscope": "/compatible-api/v1",
    "litellm_proxy": "",
}
result = {}
for provider, path in bases.items():
    # For Infinity, LiteLLM expects a document as a text, and for the others as an object.
    response = litellm.rerank(
        model=f"{provider}/reranker", api_base=url + path, return_documents=provider != "infinity", **options
    )
    if provider != "infinity":
        texts = [each["document"]["text"] for each in response.results]
        assert texts == [documents[each["index"]] for each in response.results], provider
    result[provider] = [[each["index"], each["relevance_score"]] for each in response.results]
response = asyncio.run(litellm.arerank(model="cohere/reranker", api_base=url, top_n=2, **options))
result["first two"] = [[each["index"], each["relevance_score"]] for each in response.results]
try:
    litellm.rerank(model="cohere/nope", api_base=url, **options)
except litellm.NotFoundError as error:
    message = str(error)
sys.stdout.write(json.dumps({"rankings": result, "error": message}))
