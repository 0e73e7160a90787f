// The SDK of Cohere, versions 1 and 2 of its API.
import { CohereClient, CohereClientV2 } from "cohere-ai";

const { url, key, texts } = JSON.parse(process.argv[2]);
const version1 = new CohereClient({ environment: url, token: key });
const version2 = new CohereClientV2({ environment: url, token: key });
const request = { model: "mini", texts, inputType: "search_query" };
const embeddingTypes = ["float", "int8", "uint8", "binary", "ubinary", "base64"];

async function errorOf(client, model) {
  const error = await client
    .embed({ ...request, model, embeddingTypes: ["float"] }, { maxRetries: 0 })
    .catch((error) => error);
  return { name: error.constructor.name, status: error.statusCode, message: error.message };
}

console.log(
  JSON.stringify({
    vectors: (await version1.embed(request)).embeddings,
    types: {
      "version 1": (await version1.embed({ ...request, embeddingTypes })).embeddings,
      "version 2": (await version2.embed({ ...request, embeddingTypes })).embeddings,
    },
    shortened: (await version2.embed({ ...request, embeddingTypes: ["int8"], outputDimension: 64 })).embeddings,
    documents: (await version2.embed({ ...request, inputType: "search_document", embeddingTypes: ["float"] }))
      .embeddings.float,
    errors: {
      "unknown model": await errorOf(version2, "nope"),
      "wrong key": await errorOf(new CohereClientV2({ environment: url, token: "wrong" }), "mini"),
    },
  }),
);
