// The rerankers of the SDK of Cohere, versions 1 and 2 of its API.
import { CohereClient, CohereClientV2 } from "cohere-ai";

const { url, key, query, documents } = JSON.parse(process.argv[2]);
const version1 = new CohereClient({ environment: url, token: key });
const version2 = new CohereClientV2({ environment: url, token: key });
const request = { model: "reranker", query, documents };
const placed = (response) => response.results.map((each) => [each.index, each.relevanceScore]);
const withDocuments = await version1.rerank({ ...request, returnDocuments: true });

console.log(
  JSON.stringify({
    rankings: {
      "version 1": placed(withDocuments),
      "version 2": placed(await version2.rerank(request)),
      objects: placed(await version1.rerank({ ...request, documents: documents.map((text) => ({ text })) })),
    },
    first: placed(await version2.rerank({ ...request, topN: 2 })),
    documents: withDocuments.results.map((each) => each.document.text),
    tokens: withDocuments.meta.tokens.inputTokens,
    error: await version2.rerank({ ...request, model: "nope" }, { maxRetries: 0 }).catch((error) => ({
      name: error.constructor.name,
      status: error.statusCode,
      message: error.message,
    })),
  }),
);
