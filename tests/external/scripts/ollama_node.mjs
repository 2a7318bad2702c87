// /// script
// [tool.local-llm]
// node = ["ollama@0.6.4"]
// environment = "node-sdks"
// ///
// The `ollama` package: models, chats, a stream, a tool loop, a form, vectors.
import { Ollama } from "ollama";
import { AS_JSON, EMBEDDING_MODEL, HELLO, MODEL, PARAMETERS, QUESTION, REPORT, SCHEMA, TEXT_MODEL, TOLD, URL_, assert, feature } from "./_features.mjs";

const client = new Ollama({ host: URL_ });
const model = MODEL;
const messages = [{ role: "user", content: "hello" }];

await feature("list and show", async () => {
  assert.ok((await client.list()).models.some((each) => each.name === MODEL));
  assert.ok((await client.show({ model })).capabilities.includes("tools"));
});
await feature("chat and stream", async () => {
  assert.equal((await client.chat({ model, messages })).message.content, HELLO);
  let text = "";
  for await (const part of await client.chat({ model, messages, stream: true })) text += part.message.content;
  assert.equal(text, HELLO);
});
await feature("tool loop", async () => {
  const tools = [{ type: "function", function: { name: "weather", description: "", parameters: PARAMETERS } }];
  const said = [{ role: "user", content: QUESTION }];
  const { message } = await client.chat({ model, messages: said, tools });
  said.push(message, { role: "tool", content: "cold", tool_name: message.tool_calls[0].function.name });
  assert.equal((await client.chat({ model, messages: said, tools })).message.content, TOLD);
});
await feature("format", async () => {
  const answer = await client.chat({ model, messages: [{ role: "user", content: AS_JSON }], format: SCHEMA });
  assert.deepEqual(JSON.parse(answer.message.content), REPORT);
});
await feature("generate", async () => {
  const answer = await client.generate({ model: TEXT_MODEL, prompt: "the cat", options: { num_predict: 5 } });
  assert.equal(answer.eval_count, 5);
});
await feature("embed", async () => {
  assert.equal((await client.embed({ model: EMBEDDING_MODEL, input: ["the cat", "a dog"] })).embeddings.length, 2);
});
