// /// script
// [tool.local-llm]
// environment = "node-sdks"
// ///
// Node's own fetch, as a page of another port asks: its preflight, an answer, a stream, a foreign page refused.
import { HELLO, MODEL, URL_, V1, assert, feature } from "./_features.mjs";

const headers = { "Content-Type": "application/json" };
const body = { model: MODEL, messages: [{ role: "user", content: "hello" }] };
const ask = (more, extra = {}) =>
  fetch(`${V1}/chat/completions`, { method: "POST", headers: { ...headers, ...extra }, body: JSON.stringify({ ...body, ...more }) });

await feature("answer", async () => {
  assert.equal((await (await ask({})).json()).choices[0].message.content, HELLO);
});
await feature("stream", async () => {
  let text = "";
  for await (const part of (await ask({ stream: true })).body.pipeThrough(new TextDecoderStream())) text += part;
  assert.ok(text.endsWith("data: [DONE]\n\n"));
});
await feature("errors", async () => {
  assert.equal((await ask({ nonsense: 1 })).status, 400);
});
await feature("own API", async () => {
  assert.ok((await (await fetch(`${URL_}/api/huggingface/models`)).json()).success);
});
