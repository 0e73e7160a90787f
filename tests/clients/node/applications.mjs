// The requests of FastGPT, AnythingLLM and n8n, with the SDKs that they use, as their source code builds them.
import { OpenAIEmbeddings } from "@langchain/openai";
import { Ollama } from "ollama";
import OpenAI from "openai";

const { url, key, texts } = JSON.parse(process.argv[2]);

// FastGPT sends one text at a time by default; a custom request URL replaces the path of the SDK.
async function fastgpt(requestUrl) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: requestUrl ? "wrong" : key, maxRetries: 2 });
  const options = requestUrl ? { path: requestUrl, headers: { Authorization: `Bearer ${key}` } } : { headers: {} };
  const vectors = [];
  for (const text of texts) {
    const request = { model: "mini", input: [text], encoding_format: "float" };
    const response = await client.embeddings.create(request, options);
    vectors.push(...response.data.map((item) => item.embedding));
  }
  return vectors;
}

// AnythingLLM sends up to 500 chunks in one request.
async function anythingllm() {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });
  const chunks = Array.from({ length: 500 }, (_, index) => texts[index % texts.length]);
  const response = await client.embeddings.create({ model: "mini", input: chunks });
  return response.data.map((item) => item.embedding);
}

// Its embedder for Ollama first requests the root.
async function anythingllmWithOllama() {
  if (!(await fetch(url)).ok) throw new Error("The service could not be reached.");
  const client = new Ollama({ host: url, headers: { Authorization: `Bearer ${key}` } });
  return (await client.embed({ model: "mini", input: texts, options: { num_ctx: 256 } })).embeddings;
}

// n8n takes the URL of the list of models apart. Its options are these by default.
async function n8n(baseUrl) {
  const parts = baseUrl.split("/");
  const list = `${parts.slice(0, -1).join("/")}/${parts.at(-1) || "v1"}/models`;
  const models = await (await fetch(list, { headers: { Authorization: `Bearer ${key}` } })).json();
  const options = { batchSize: 512, stripNewLines: true, timeout: undefined, encodingFormat: "float" };
  const embeddings = new OpenAIEmbeddings({
    model: "mini",
    apiKey: key,
    ...options,
    configuration: { baseURL: baseUrl, defaultHeaders: {} },
  });
  return { models: models.data.map((model) => model.id), vectors: await embeddings.embedDocuments(texts) };
}

console.log(
  JSON.stringify({
    vectors: {
      fastgpt: await fastgpt(),
      "fastgpt, custom request URL": await fastgpt(`${url}/v1/embeddings`),
      "anythingllm, Ollama": await anythingllmWithOllama(),
    },
    anythingllm: await anythingllm(),
    n8n: { "/v1": await n8n(`${url}/v1`), "/v1/": await n8n(`${url}/v1/`), "": await n8n(url) },
  }),
);
