// The SDK of OpenAI, as such and for Azure. By default it requests base64, and decodes it.
import OpenAI, { AzureOpenAI } from "openai";

const { url, key, texts } = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });
const azure = new AzureOpenAI({ endpoint: url, apiKey: key, apiVersion: "2024-10-21" });

async function vectors(client, fields = {}) {
  const response = await client.embeddings.create({ model: "mini", input: texts, ...fields });
  return response.data.map((item) => item.embedding);
}

async function errorOf(client, model) {
  const error = await client.embeddings.create({ model, input: "x" }).catch((error) => error);
  return { name: error.constructor.name, status: error.status, code: error.code, message: error.message };
}

const models = [];
for await (const model of client.models.list()) models.push(model.id);

console.log(
  JSON.stringify({
    vectors: {
      default: await vectors(client),
      float: await vectors(client, { encoding_format: "float" }),
      azure: await vectors(azure),
      "without /v1": await vectors(new OpenAI({ baseURL: url, apiKey: key })),
    },
    base64: await vectors(client, { encoding_format: "base64" }),
    shortened: await vectors(client, { dimensions: 64 }),
    query: await vectors(client, { model: "mini-query" }),
    models,
    errors: {
      "unknown model": await errorOf(client, "nope"),
      "wrong key": await errorOf(new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong" }), "mini"),
    },
  }),
);
