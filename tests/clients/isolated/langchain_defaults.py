"""LangChain's `OpenAIEmbeddings` and `init_embeddings` without options, configured by environment variables only."""

import json
import sys

from langchain.embeddings import init_embeddings
from langchain_openai import OpenAIEmbeddings

texts = json.load(sys.stdin)["texts"]
result = {
    "OpenAIEmbeddings": OpenAIEmbeddings().embed_documents(texts),
    "init_embeddings": init_embeddings("openai:text-embedding-3-small").embed_documents(texts),
    "queries": [OpenAIEmbeddings().embed_query(text) for text in texts],
}
sys.stdout.write(json.dumps(result))
