// What the scripts in JavaScript share: where the server is, what its agent model says, and a line for each feature.
// `feature(name, check)` runs a check when its turn comes; `known` is the reason why it does not work with this program.
import assert from "node:assert/strict";

export { assert };
export const URL_ = process.env.LOCAL_LLM_URL;
export const V1 = `${URL_}/v1`;
export const MODEL = process.env.AGENT_MODEL;
export const TEXT_MODEL = process.env.TEXT_MODEL;
export const EMBEDDING_MODEL = process.env.EMBEDDING_MODEL;
export const ADDRESS = `${URL_}/api/huggingface/models/${MODEL}`;

export const HELLO = "Good morning.";
export const TOLD = "Oslo is cold.";
export const REPORT = { city: "Oslo", cold: true };
export const QUESTION = "How is the weather in Oslo?";
export const AS_JSON = `${QUESTION} Answer as JSON.`;
export const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
export const SCHEMA = {
  type: "object",
  properties: { city: { type: "string" }, cold: { type: "boolean" } },
  required: ["city", "cold"],
  additionalProperties: false,
};

export async function feature(name, check, known = "") {
  try {
    await check();
    console.log(`ok ${name}`);
  } catch (error) {
    if (known) {
      console.log(`known ${name}: ${known}`);
      return;
    }
    process.exitCode = 1;
    const cause = error.responseBody ?? error.cause?.message ?? "";
    console.log(`failed ${name}: ${`${error.name}: ${error.message} ${cause}`.replace(/\s+/g, " ").slice(0, 1000)}`);
    console.log(error.stack);
  }
}
