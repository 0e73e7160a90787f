"""mem0: its embedders for OpenAI and Ollama, without the rest."""

import json
import os
import sys

from mem0.utils.factory import EmbedderFactory

call = json.load(sys.stdin)
os.environ["OLLAMA_API_KEY"] = call["key"]
configurations = {
    "openai": {"openai_base_url": f"{call['url']}/v1", "api_key": call["key"]},
    "ollama": {"ollama_base_url": call["url"]},
}
result = {}
for provider, configuration in configurations.items():
    embedder = EmbedderFactory.create(provider, {"model": "mini", "embedding_dims": 384, **configuration}, None)
    result[provider] = [embedder.embed(text, "add") for text in call["texts"]]
    result[f"{provider} batch"] = embedder.embed_batch(call["texts"])
sys.stdout.write(json.dumps(result))
