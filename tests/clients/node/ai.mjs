// Vercel's AI SDK with its two providers for this API.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, embedMany } from "ai";

const { url, key, texts } = JSON.parse(process.argv[2]);
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: key });
const compatible = createOpenAICompatible({ name: "local", baseURL: `${url}/v1`, apiKey: key });

async function vectors(provider, providerOptions) {
  const model = provider.embeddingModel("mini");
  return (await embedMany({ model, values: texts, providerOptions })).embeddings;
}

async function errorOf(model) {
  const error = await embed({ model, value: "x" }).catch((error) => error);
  return { name: error.name, status: error.statusCode, message: error.message };
}

console.log(
  JSON.stringify({
    vectors: { openai: await vectors(openai), compatible: await vectors(compatible) },
    shortened: {
      openai: await vectors(openai, { openai: { dimensions: 64 } }),
      compatible: await vectors(compatible, { local: { dimensions: 64 } }),
    },
    query: (await embed({ model: compatible.embeddingModel("mini-query"), value: texts[0] })).embedding,
    errors: {
      openai: await errorOf(openai.embeddingModel("nope")),
      compatible: await errorOf(compatible.embeddingModel("nope")),
    },
  }),
);
