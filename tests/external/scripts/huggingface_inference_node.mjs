// /// script
// [tool.local-llm]
// node = ["@huggingface/inference@4.13.30"]
// environment = "node-sdks"
// ///
// huggingface.js: chats, streams, tools, text, and the tasks of its README.
import { InferenceClient } from "@huggingface/inference";
import { ADDRESS, HELLO, PARAMETERS, QUESTION, URL_, assert, feature } from "./_features.mjs";

const of = (name) => new InferenceClient("none", { endpointUrl: `${URL_}/api/huggingface/models/${process.env[name]}` });
const client = new InferenceClient("none", { endpointUrl: ADDRESS });
const messages = [{ role: "user", content: "hello" }];
const context = "the cat sat on the mat and the dog ran to the house";

await feature("chatCompletion and stream", async () => {
  assert.equal((await client.chatCompletion({ messages })).choices[0].message.content, HELLO);
  let text = "";
  for await (const part of client.chatCompletionStream({ messages })) text += part.choices[0]?.delta.content ?? "";
  assert.equal(text, HELLO);
});
await feature("chat tools", async () => {
  const tools = [{ type: "function", function: { name: "weather", description: "", parameters: PARAMETERS } }];
  const answer = await client.chatCompletion({ messages: [{ role: "user", content: QUESTION }], tools });
  assert.equal(answer.choices[0].message.tool_calls[0].function.name, "weather");
});
await feature("textGeneration and stream", async () => {
  const asked = { inputs: "the cat", parameters: { max_new_tokens: 5 } };
  assert.ok(await of("TEXT_MODEL").textGeneration(asked));
  const parts = [];
  for await (const part of of("TEXT_MODEL").textGenerationStream(asked)) parts.push(part);
  assert.ok(parts.length);
});
await feature("summarization and translation", async () => {
  assert.ok(await of("SUMMARY_MODEL").summarization({ inputs: context, parameters: { max_length: 100 } }));
  assert.ok(await of("TRANSLATION_MODEL").translation({ inputs: context }));
});
await feature("question answering", async () => {
  assert.ok(await of("QUESTION_MODEL").questionAnswering({ inputs: { question: "where is the cat", context } }));
});
await feature("classification", async () => {
  assert.equal((await of("CLASS_MODEL").textClassification({ inputs: "the cat" })).length, 2);
  assert.ok(await of("ENTITY_MODEL").tokenClassification({ inputs: context }));
  assert.ok(await of("MASK_MODEL").fillMask({ inputs: "the [MASK] sat" }));
  const labels = { candidate_labels: ["cat", "dog"] };
  assert.ok(await of("ZERO_SHOT_MODEL").zeroShotClassification({ inputs: ["the cat"], parameters: labels }));
});
await feature("vectors", async () => {
  assert.ok(await of("EMBEDDING_MODEL").featureExtraction({ inputs: "the cat" }));
  const inputs = { source_sentence: "the cat", sentences: ["a dog", "the cat"] };
  assert.equal((await of("EMBEDDING_MODEL").sentenceSimilarity({ inputs })).length, 2);
});
