// /// script
// [tool.local-llm]
// node = ["ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "@ai-sdk/openai@4.0.118", "@ai-sdk/anthropic@4.0.105", "ollama-ai-provider-v2@4.0.1", "zod@4.6.7"]
// environment = "vercel-ai-sdk"
// ///
// The Vercel AI SDK with four providers: texts, streams, a tool loop, objects, tools together with an object, vectors.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, embedMany, generateText, isStepCount, streamText, tool } from "ai";
import { createOllama } from "ollama-ai-provider-v2";
import { z } from "zod";
import { AS_JSON, EMBEDDING_MODEL, HELLO, MODEL, QUESTION, REPORT, TOLD, URL_, V1, assert, feature } from "./_features.mjs";

const compatible = createOpenAICompatible({ name: "local", baseURL: V1, apiKey: "none", supportsStructuredOutputs: true });
const openai = createOpenAI({ baseURL: V1, apiKey: "none" });
const models = {
  "openai-compatible": compatible(MODEL),
  "openai chat": openai.chat(MODEL),
  "openai responses": openai.responses(MODEL),
  anthropic: createAnthropic({ baseURL: V1, apiKey: "none" })(MODEL),
  ollama: createOllama({ baseURL: `${URL_}/api` })(MODEL),
};
const schema = z.object({ city: z.string(), cold: z.boolean() });
const tools = {
  weather: tool({
    description: "The weather in a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => `${city}: cold`,
  }),
};
const more = { maxRetries: 0, maxOutputTokens: 200 };

for (const [name, model] of Object.entries(models)) {
  await feature(`${name} generateText`, async () => {
    assert.equal((await generateText({ model, prompt: "hello", ...more })).text, HELLO);
  });
  await feature(`${name} streamText`, async () => {
    let failure = null;
    const stream = streamText({ model, prompt: "hello", ...more, onError: ({ error }) => (failure = error) });
    let text = "";
    for await (const part of stream.textStream) text += part;
    if (failure) throw failure;
    assert.equal(text, HELLO);
  });
  await feature(`${name} tool loop`, async () => {
    const answer = await generateText({ model, tools, prompt: QUESTION, stopWhen: isStepCount(3), ...more });
    assert.equal(answer.text, TOLD);
  });
  await feature(`${name} object`, async () => {
    const answer = await generateText({ model, output: Output.object({ schema }), prompt: AS_JSON, ...more });
    assert.deepEqual(answer.output, REPORT);
  });
  await feature(`${name} tools with an object`, async () => {
    const asked = { model, tools, output: Output.object({ schema }), prompt: AS_JSON, stopWhen: isStepCount(4) };
    assert.deepEqual((await generateText({ ...asked, ...more })).output, REPORT);
  });
}
await feature("embedMany", async () => {
  const { embeddings } = await embedMany({ model: compatible.embeddingModel(EMBEDDING_MODEL), values: ["the cat", "a dog"] });
  assert.equal(embeddings.length, 2);
});
