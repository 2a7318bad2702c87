// /// script
// [tool.local-llm]
// node = ["openai@7.59.0", "zod@4.6.7"]
// environment = "node-sdks"
// ///
// The `openai` package: chats, streams, a tool loop, forms, responses, embeddings, an aborted stream.
import OpenAI from "openai";
import { AS_JSON, EMBEDDING_MODEL, HELLO, MODEL, PARAMETERS, QUESTION, REPORT, SCHEMA, TEXT_MODEL, TOLD, V1, assert, feature } from "./_features.mjs";

const client = new OpenAI({ baseURL: V1, apiKey: "none", maxRetries: 0 });
const greeting = [{ role: "user", content: "hello" }];
const form = { type: "json_schema", json_schema: { name: "report", schema: SCHEMA, strict: true } };
const tools = [{ type: "function", function: { name: "weather", parameters: PARAMETERS, strict: true } }];

await feature("models", async () => {
  const found = [];
  for await (const model of client.models.list()) found.push(model.id);
  assert.ok(found.includes(MODEL));
});
await feature("chat", async () => {
  const answer = await client.chat.completions.create({ model: MODEL, messages: greeting });
  assert.equal(answer.choices[0].message.content, HELLO);
});
await feature("stream", async () => {
  let text = "";
  for await (const part of await client.chat.completions.create({ model: MODEL, messages: greeting, stream: true })) {
    text += part.choices[0]?.delta.content ?? "";
  }
  assert.equal(text, HELLO);
});
await feature("aborted stream", async () => {
  const stream = await client.chat.completions.create({ model: MODEL, messages: greeting, stream: true });
  stream.controller.abort();
});
await feature("runTools", async () => {
  const weather = { ...tools[0].function, function: ({ city }) => `${city}: cold`, parse: JSON.parse };
  const runner = client.chat.completions.runTools({
    model: MODEL,
    messages: [{ role: "user", content: QUESTION }],
    tools: [{ type: "function", function: weather }],
  });
  assert.equal(await runner.finalContent(), TOLD);
});
await feature("tools with response_format", async () => {
  const messages = [{ role: "user", content: AS_JSON }];
  const options = { model: MODEL, tools, response_format: form };
  const first = (await client.chat.completions.parse({ ...options, messages })).choices[0].message;
  messages.push(first, { role: "tool", tool_call_id: first.tool_calls[0].id, content: "cold" });
  assert.deepEqual((await client.chat.completions.parse({ ...options, messages })).choices[0].message.parsed, REPORT);
});
await feature("completions", async () => {
  const answer = await client.completions.create({ model: TEXT_MODEL, prompt: "the cat", max_tokens: 4, echo: true });
  assert.ok(answer.choices[0].text.startsWith("the cat"));
});
await feature("responses", async () => {
  assert.equal((await client.responses.create({ model: MODEL, input: "hello" })).output_text, HELLO);
  const stream = client.responses.stream({ model: MODEL, input: "hello" });
  assert.equal((await stream.finalResponse()).output_text, HELLO);
});
await feature("embeddings", async () => {
  const answer = await client.embeddings.create({ model: EMBEDDING_MODEL, input: ["the cat", "a dog"] });
  assert.equal(answer.data.length, 2);
});
await feature("moderations", async () => client.moderations.create({ input: "x" }), "no such route: 404 in OpenAI's shape");
