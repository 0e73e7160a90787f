"""Chroma: its embedding functions, and a collection that uses one of them."""

import json
import os
import sys
from typing import Any

import chromadb
from chromadb.utils.embedding_functions import (
    HuggingFaceEmbeddingServer,
    OllamaEmbeddingFunction,
    OpenAIEmbeddingFunction,
)

call = json.load(sys.stdin)
url, texts = call["url"], call["texts"]
# The function of Ollama has no parameter for a key, but its SDK reads this variable.
os.environ |= {"CHROMA_OPENAI_API_KEY": call["key"], "OLLAMA_API_KEY": call["key"]}
openai = OpenAIEmbeddingFunction(api_base=f"{url}/v1", model_name="mini")
functions: dict[str, Any] = {
    "openai": openai,
    "ollama": OllamaEmbeddingFunction(url=url, model_name="mini"),
    "huggingface": HuggingFaceEmbeddingServer(url=f"{url}/embed", api_key=call["key"]),
}
result = {name: [vector.tolist() for vector in function(texts)] for name, function in functions.items()}
collection = chromadb.EphemeralClient().create_collection("texts", embedding_function=openai)
ids = [str(number) for number in range(len(texts))]
collection.add(ids=ids, documents=texts)
stored = collection.get(ids=ids, include=["embeddings"])
result["collection"] = [stored["embeddings"][stored["ids"].index(number)].tolist() for number in ids]
result["nearest"] = [found[0] for found in collection.query(query_texts=texts, n_results=1)["ids"]]
sys.stdout.write(json.dumps(result))
