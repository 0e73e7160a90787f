// LangChain's class for OpenAI, which n8n uses, too.
import { OpenAIEmbeddings } from "@langchain/openai";

const { url, key, texts } = JSON.parse(process.argv[2]);

function embeddings(fields) {
  return new OpenAIEmbeddings({ apiKey: key, maxRetries: 0, configuration: { baseURL: `${url}/v1` }, ...fields });
}

async function errorOf(embeddings) {
  const error = await embeddings.embedQuery("x").catch((error) => error);
  return { name: error.constructor.name, status: error.status, message: error.message };
}

const model = embeddings({ model: "mini" });
console.log(
  JSON.stringify({
    vectors: {
      default: await model.embedDocuments(texts),
      float: await embeddings({ model: "mini", encodingFormat: "float" }).embedDocuments(texts),
      "small batches": await embeddings({ model: "mini", batchSize: 1 }).embedDocuments(texts),
    },
    query: await embeddings({ model: "mini-query" }).embedQuery(texts[0]),
    errors: { "unknown model": await errorOf(embeddings({ model: "nope" })) },
  }),
);
