"""Rerankers of frameworks and SDKs, each of which prints the places and scores of the documents in its order."""

import asyncio
import json
import sys

import dashscope
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
from lightrag.rerank import ali_rerank, cohere_rerank, jina_rerank
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from pymilvus.model.reranker import TEIRerankFunction

call = json.load(sys.stdin)
url, key, query, documents = call["url"], call["key"], call["query"], call["documents"]
result = {}


def placed(found):
    """Return the place of each document, and its score."""
    return [[documents.index(text), score] for text, score in found]


haystack_documents = [Document(content=text) for text in documents]
rankers = {
    "Haystack, Cohere": CohereRanker(
        "reranker", api_key=Secret.from_token(key), api_base_url=url, top_k=len(documents)
    ),
    "Haystack, TEI": HuggingFaceTEIRanker(url=url, token=Secret.from_token(key)),
}
for name, ranker in rankers.items():
    for path, run in (("", ranker.run), (", asynchronous", ranker.run_async)):
        found = run(query=query, documents=haystack_documents)
        if path:
            found = asyncio.run(found)
        result[name + path] = placed((each.content, each.score) for each in found["documents"])

nodes = [NodeWithScore(node=TextNode(text=text)) for text in documents]
postprocessor = TextEmbeddingInference(base_url=url, top_n=len(documents), auth_token=f"Bearer {key}")
found = postprocessor.postprocess_nodes(nodes, QueryBundle(query))
result["LlamaIndex, TEI"] = placed((each.node.text, each.score) for each in found)

milvus = TEIRerankFunction(url)
milvus._session.headers["Authorization"] = f"Bearer {key}"  # it has no parameter for a key
result["pymilvus, TEI"] = placed((each.text, each.score) for each in milvus(query, documents))

lightrag = {
    "jina_rerank": (jina_rerank, f"{url}/v1/rerank"),
    "cohere_rerank": (cohere_rerank, f"{url}/v2/rerank"),
    "ali_rerank": (ali_rerank, f"{url}/api/v1/services/rerank/text-rerank/text-rerank"),
}
for name, (function, address) in lightrag.items():
    found = asyncio.run(function(query, documents, api_key=key, model="reranker", base_url=address))
    result[f"LightRAG, {name}"] = [[each["index"], each["relevance_score"]] for each in found]

dashscope.base_http_api_url = f"{url}/api/v1"
response = dashscope.TextReRank.call("reranker", query, documents, return_documents=True, api_key=key)
assert response.status_code == 200, response
assert response.usage.total_tokens > 0
# Not `each.document`, which is None in this version of the SDK, whatever the response has.
result["DashScope"] = placed((each["document"]["text"], each["relevance_score"]) for each in response.output.results)
response = dashscope.TextReRank.call("nope", query, documents, api_key=key)
assert (response.status_code, response.code) == (404, "model_not_found"), response

sys.stdout.write(json.dumps(result))
