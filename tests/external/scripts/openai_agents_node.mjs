// /// script
// [tool.local-llm]
// node = ["@openai/agents@0.20.0", "openai@7.59.0", "zod@4.6.7"]
// environment = "node-sdks"
// ///
// OpenAI's agents SDK over chats and responses: a tool, an output type, both, a stream.
import { Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, run, setTracingDisabled, tool } from "@openai/agents";
import OpenAI from "openai";
import { z } from "zod";
import { AS_JSON, HELLO, MODEL, QUESTION, REPORT, TOLD, V1, assert, feature } from "./_features.mjs";

setTracingDisabled(true);
const client = new OpenAI({ baseURL: V1, apiKey: "none", maxRetries: 0 });
const Weather = z.object({ city: z.string(), cold: z.boolean() });
const weather = tool({
  name: "weather",
  description: "The weather in a city",
  parameters: z.object({ city: z.string() }),
  execute: ({ city }) => `${city}: cold`,
});

for (const [name, model] of [
  ["chat", new OpenAIChatCompletionsModel(client, MODEL)],
  ["responses", new OpenAIResponsesModel(client, MODEL)],
]) {
  const agent = (more) => new Agent({ name: "Ada", model, instructions: "Be brief.", ...more });
  await feature(`${name} plain`, async () => assert.equal((await run(agent({}), "hello")).finalOutput, HELLO));
  await feature(`${name} tools`, async () => {
    assert.equal((await run(agent({ tools: [weather] }), QUESTION)).finalOutput, TOLD);
  });
  await feature(`${name} tools with outputType`, async () => {
    const answer = await run(agent({ tools: [weather], outputType: Weather }), AS_JSON);
    assert.deepEqual(answer.finalOutput, REPORT);
  });
  await feature(`${name} stream`, async () => {
    const stream = await run(agent({ tools: [weather] }), QUESTION, { stream: true });
    await stream.completed;
    assert.equal(stream.finalOutput, TOLD);
  });
}
