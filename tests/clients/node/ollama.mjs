// The SDK of Ollama.
import { Ollama } from "ollama";

const { url, key, texts } = JSON.parse(process.argv[2]);
const client = new Ollama({ host: url, headers: { Authorization: `Bearer ${key}` } });

async function vectors(fields = {}) {
  return (await client.embed({ model: "mini", input: texts, ...fields })).embeddings;
}

async function errorOf(call) {
  const error = await call.catch((error) => error);
  return { name: error.name, status: error.status_code, message: error.message };
}

console.log(
  JSON.stringify({
    vectors: { default: await vectors(), "with a tag": await vectors({ model: "nomic-embed-text:latest" }) },
    shortened: await vectors({ dimensions: 64 }),
    "older route": (await client.embeddings({ model: "mini", prompt: texts[0] })).embedding,
    models: (await client.list()).models.map((model) => model.name),
    capabilities: (await client.show({ model: "mini" })).capabilities,
    version: (await client.version()).version,
    errors: {
      "unknown model": await errorOf(client.embed({ model: "nope", input: "x" })),
      "forbidden truncation": await errorOf(client.embed({ model: "mini", input: texts, truncate: false })),
      "missing key": await errorOf(new Ollama({ host: url }).embed({ model: "mini", input: "x" })),
    },
  }),
);
