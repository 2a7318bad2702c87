// /// script
// [tool.local-llm]
// node = ["@anthropic-ai/sdk@1.14.0"]
// environment = "node-sdks"
// ///
// The `@anthropic-ai/sdk` package: messages, a stream, a tool loop, counting, models.
import Anthropic from "@anthropic-ai/sdk";
import { HELLO, MODEL, PARAMETERS, QUESTION, TOLD, URL_, assert, feature } from "./_features.mjs";

const client = new Anthropic({ baseURL: URL_, apiKey: "none", maxRetries: 0 });
const options = { model: MODEL, max_tokens: 200 };
const greeting = [{ role: "user", content: "hello" }];
const tools = [{ name: "weather", description: "The weather", input_schema: PARAMETERS }];

await feature("models", async () => {
  const found = [];
  for await (const model of client.models.list()) found.push(model.id);
  assert.ok(found.includes(MODEL));
});
await feature("messages", async () => {
  assert.equal((await client.messages.create({ ...options, messages: greeting })).content[0].text, HELLO);
});
await feature("stream", async () => {
  assert.equal(await client.messages.stream({ ...options, messages: greeting }).finalText(), HELLO);
});
await feature("tool loop", async () => {
  const messages = [{ role: "user", content: QUESTION }];
  const first = await client.messages.create({ ...options, messages, tools });
  const call = first.content.find((block) => block.type === "tool_use");
  assert.deepEqual(call.input, { city: "Oslo" });
  messages.push({ role: "assistant", content: first.content });
  messages.push({ role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "cold" }] });
  assert.equal((await client.messages.create({ ...options, messages, tools })).content[0].text, TOLD);
});
await feature("countTokens", async () => {
  assert.ok((await client.messages.countTokens({ model: MODEL, messages: greeting })).input_tokens > 0);
});
