// The Batch API with the SDK of OpenAI: upload, create, poll, download, cancel, errors.
import OpenAI, { toFile } from "openai";

const { url, key, lines, invalid, stuck } = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });

const upload = (lines, fields = {}) =>
  toFile(Buffer.from(lines.map((line) => `${JSON.stringify(line)}\n`).join("")), "requests.jsonl").then((file) =>
    client.files.create({ file, purpose: "batch", ...fields }),
  );

async function ended(batch, states = ["validating", "in_progress", "finalizing", "cancelling"]) {
  while (states.includes(batch.status)) {
    await new Promise((resolve) => setTimeout(resolve, 100));
    batch = await client.batches.retrieve(batch.id);
  }
  return batch;
}

const create = (file, endpoint, fields = {}) =>
  client.batches.create({ input_file_id: file.id, endpoint, completion_window: "24h", ...fields });

const read = async (id) => {
  const text = await (await client.files.content(id)).text();
  return text.trim().split("\n").map((line) => JSON.parse(line));
};

const results = {};
for (const [endpoint, requests] of Object.entries(lines)) {
  const file = await upload(requests, { expires_after: { anchor: "created_at", seconds: 7200 } });
  const batch = await ended(await create(file, endpoint, { metadata: { run: "node" } }));
  results[endpoint] = {
    file,
    batch,
    lines: await read(batch.output_file_id),
    errors: batch.error_file_id ? await read(batch.error_file_id) : [],
  };
}

const failed = await ended(await create(await upload(invalid), "/v1/embeddings"));

const waiting = await create(await upload(stuck), "/v1/embeddings");
await ended(waiting, ["validating"]);
await client.batches.cancel(waiting.id);
const cancelled = await ended(await client.batches.retrieve(waiting.id));
const conflict = await client.batches.cancel(waiting.id).catch((error) => error);

const ids = { batches: [], files: [] };
for await (const batch of client.batches.list({ limit: 1 })) ids.batches.push(batch.id);
for await (const file of client.files.list({ limit: 2, purpose: "batch" })) ids.files.push(file.id);

const deleted = await client.files.delete(waiting.input_file_id);
const missing = await client.files.retrieve(waiting.input_file_id).catch((error) => error);

const describe = (error) => ({ name: error.constructor.name, status: error.status, code: error.code });
console.log(
  JSON.stringify({
    results,
    failed,
    cancelled,
    conflict: describe(conflict),
    batches: ids.batches,
    files: ids.files,
    deleted,
    missing: describe(missing),
  }),
);
