"""LiteLLM's SDK, with the providers that a user may choose for a server with OpenAI's API."""

import asyncio
import json
import sys

import litellm

call = json.load(sys.stdin)
options = {"input": call["texts"], "api_key": call["key"]}
bases = {"openai": "/v1", "hosted_vllm": "/v1", "litellm_proxy": "/v1", "openai_like": "/v1"}
result = {}
for provider, path in bases.items():
    response = litellm.embedding(model=f"{provider}/mini", api_base=call["url"] + path, **options)
    result[provider] = [item["embedding"] for item in response.data]
response = asyncio.run(litellm.aembedding(model="openai/mini", api_base=f"{call['url']}/v1", **options))
result["asynchronous"] = [item["embedding"] for item in response.data]
sys.stdout.write(json.dumps(result))
