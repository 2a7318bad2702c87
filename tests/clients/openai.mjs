// The `openai` package for Node: a chat, a stream, a call, an embedding, an error. Arguments: base URL, model, embedder.
import OpenAI from "openai";

const [baseURL, model, embedder] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "where is the cat?" }];
const options = { model, messages, temperature: 0, max_tokens: 12 };

const chat = await client.chat.completions.create(options);
let streamed = "";
for await (const event of await client.chat.completions.create({ ...options, stream: true })) {
  streamed += event.choices[0].delta.content ?? "";
}
const parameters = { type: "object", properties: { city: { enum: ["Oslo"] } }, required: ["city"] }; // and no others
const called = await client.chat.completions.create({
  ...options,
  max_tokens: 100,
  tools: [{ type: "function", function: { name: "weather", parameters } }],
  tool_choice: "required",
  parallel_tool_calls: false,
});
const embedding = await client.embeddings.create({ model: embedder, input: ["the cat"] });
const response = await client.responses.create({ model, input: "where is the cat?", temperature: 0, max_output_tokens: 12 });
let error = null;
try {
  await client.chat.completions.create({ ...options, model: "no/such" });
} catch (caught) {
  error = { status: caught.status, code: caught.code, kind: caught.constructor.name };
}
console.log(
  JSON.stringify({
    said: chat.choices[0].message.content,
    streamed,
    call: called.choices[0].message.tool_calls[0].function,
    embedding: embedding.data[0].embedding,
    response: response.output_text,
    error,
  }),
);
