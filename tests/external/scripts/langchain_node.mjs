// /// script
// [tool.local-llm]
// node = ["@langchain/core@1.4.0", "langchain@1.5.14", "@langchain/openai@1.6.0", "@langchain/ollama@1.3.0", "@langchain/anthropic@1.5.11", "zod@4.6.7"]
// environment = "langchain-node"
// ///
// LangChain.js with three packages: chats, streams, agents with a tool, structured output, vectors.
import { ChatAnthropic } from "@langchain/anthropic";
import { ChatOllama, OllamaEmbeddings } from "@langchain/ollama";
import { ChatOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { createAgent, providerStrategy, tool } from "langchain";
import { z } from "zod";
import { AS_JSON, EMBEDDING_MODEL, HELLO, MODEL, QUESTION, REPORT, TOLD, URL_, V1, assert, feature } from "./_features.mjs";

const configuration = { baseURL: V1 };
const models = {
  chat: new ChatOpenAI({ model: MODEL, apiKey: "none", configuration, maxRetries: 0 }),
  responses: new ChatOpenAI({ model: MODEL, apiKey: "none", configuration, useResponsesApi: true, maxRetries: 0 }),
  anthropic: new ChatAnthropic({ model: MODEL, apiKey: "none", anthropicApiUrl: URL_, maxTokens: 200, maxRetries: 0 }),
  ollama: new ChatOllama({ model: MODEL, baseUrl: URL_, maxRetries: 0 }),
};
const Report = z.object({ city: z.string(), cold: z.boolean() });
const weather = tool(({ city }) => `${city}: cold`, {
  name: "weather",
  description: "The weather in a city",
  schema: z.object({ city: z.string() }),
});

for (const [name, model] of Object.entries(models)) {
  await feature(`${name} invoke and stream`, async () => {
    assert.equal((await model.invoke("hello")).text, HELLO);
    let text = "";
    for await (const part of await model.stream("hello")) text += part.text;
    assert.equal(text, HELLO);
  });
  await feature(`${name} createAgent`, async () => {
    const state = await createAgent({ model, tools: [weather] }).invoke({ messages: [{ role: "user", content: QUESTION }] });
    assert.equal(state.messages.at(-1).text, TOLD);
  });
  await feature(`${name} agent with providerStrategy`, async () => {
    const agent = createAgent({ model, tools: [weather], responseFormat: providerStrategy(Report) });
    const state = await agent.invoke({ messages: [{ role: "user", content: AS_JSON }] });
    assert.deepEqual(state.structuredResponse, REPORT);
  });
  await feature(`${name} withStructuredOutput`, async () => {
    assert.deepEqual(await model.withStructuredOutput(Report, { method: "jsonSchema" }).invoke(AS_JSON), REPORT);
  });
}
await feature("embeddings", async () => {
  const open = new OpenAIEmbeddings({ model: EMBEDDING_MODEL, apiKey: "none", configuration });
  assert.equal((await open.embedDocuments(["the cat", "a dog"])).length, 2);
  const own = new OllamaEmbeddings({ model: EMBEDDING_MODEL, baseUrl: URL_ });
  assert.equal((await own.embedDocuments(["the cat", "a dog"])).length, 2);
});
