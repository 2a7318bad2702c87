// The `ollama` package for Node: models, a chat, streams, a form, tools, vectors, errors. Arguments: host, models.
import { Ollama } from "ollama";

const [host, model, tooled, embedder] = process.argv.slice(2);
const client = new Ollama({ host });
const messages = [{ role: "user", content: "where is the cat?" }];
const options = { temperature: 0, num_predict: 12 };

const listed = (await client.list()).models.map((each) => each.name);
const shown = await client.show({ model });
const chat = await client.chat({ model, messages, options });
let streamed = "";
let last = null;
for await (const part of await client.chat({ model, messages, options, stream: true })) {
  streamed += part.message.content;
  last = part;
}
let generated = "";
for await (const part of await client.generate({ model, prompt: messages[0].content, options, stream: true })) {
  generated += part.response;
}
const format = { type: "object", properties: { a: { enum: [1] } }, required: ["a"], additionalProperties: false };
const formed = await client.generate({ model, prompt: "x", format, options: { ...options, num_predict: 60 } });
const parameters = { type: "object", properties: { city: { type: "string" } } };
const tools = ["weather", "now"].map((name) => ({ type: "function", function: { name, description: "", parameters } }));
const called = await client.chat({ model: tooled, messages, tools });
const results = called.message.tool_calls.map((call) => ({ role: "tool", content: "cold", tool_name: call.function.name }));
const answered = await client.chat({ model: tooled, messages: [...messages, called.message, ...results], tools });
const thought = await client.chat({ model: tooled, messages, think: true });
const vectors = await client.embed({ model: embedder, input: ["the cat", "a dog"] });
const vector = await client.embeddings({ model: embedder, prompt: "the cat" });
const running = (await client.ps()).models.map((each) => each.name);
const unloaded = await client.generate({ model, prompt: "", keep_alive: 0 });

async function failure(ask) {
  try {
    await ask();
    return null;
  } catch (caught) {
    return { status: caught.status_code, error: caught.error };
  }
}
console.log(
  JSON.stringify({
    listed,
    capabilities: shown.capabilities,
    said: chat.message.content,
    streamed,
    done: last.done_reason,
    generated,
    formed: formed.response,
    calls: called.message.tool_calls.map((call) => call.function),
    answered: answered.message.content,
    thought: thought.message.thinking,
    vectors: vectors.embeddings.length,
    vector: vector.embedding.length,
    running,
    unloaded: unloaded.done_reason,
    unknown: await failure(() => client.show({ model: "nope" })),
    refused: await failure(() => client.chat({ model, messages, options: { mirostat: 2 }, stream: true })),
    copied: await failure(() => client.copy({ source: model, destination: "b" })),
  }),
);
