// A client that openapi-typescript and openapi-fetch make of `/openapi.json`: generates, lists, reads a refusal.
// Compiled beside the generated `schema.d.ts`. Arguments: base URL, model.
import createClient from "openapi-fetch";
import type { paths } from "./schema.js";

declare const process: { argv: string[] };

const [baseUrl = "", model_id = ""] = process.argv.slice(2);
// Of answers that can stream too, the JSON.
const client = createClient<paths, "application/json">({ baseUrl });

const generated = await client.POST("/api/huggingface/generate", { body: { model_id, prompt: "the cat" } });
const own = await client.POST("/api/huggingface/generate", { body: { model_id, prompt: "the cat", max_new_tokens: 3 } });
const listed = await client.GET("/api/huggingface/models");
const openai = await client.GET("/v1/models");
const loaded = await client.POST("/api/huggingface/models/{model_id}/load", { params: { path: { model_id } }, body: {} });
const refused = await client.POST("/api/huggingface/generate", { body: { model_id: "no/such", prompt: "the cat" } });

// What must not pass the type check.
// @ts-expect-error a body without its model
const nothing: paths["/api/huggingface/generate"]["post"]["requestBody"]["content"]["application/json"] = { prompt: "x" };
// @ts-expect-error a number as text
nothing.max_new_tokens = "3";

const succeeded: true | undefined = generated.data?.success;
const said: string | undefined = generated.data?.response;
const failed: string | undefined = refused.error?.error;
console.log(
  JSON.stringify({
    succeeded,
    said,
    tokens: [generated.data?.parameters["max_new_tokens"], own.data?.parameters["max_new_tokens"]],
    models: listed.data?.models.map((model) => model.model_id),
    openai: openai.data?.data.map((model) => model.id),
    device: loaded.data?.device,
    failed,
  }),
);
