// huggingface.js: one call of a task. Arguments: the model's address, the method, its arguments as JSON.
import { InferenceClient } from "@huggingface/inference";

const [endpointUrl, method, text] = process.argv.slice(2);
const client = new InferenceClient("none", { endpointUrl });
const asked = client[method](JSON.parse(text));
try {
  if (method.endsWith("Stream")) {
    const events = [];
    for await (const event of asked) events.push(event);
    console.log(JSON.stringify(events));
  } else {
    console.log(JSON.stringify(await asked));
  }
} catch (error) {
  console.log(JSON.stringify({ error: `${error.message} ${JSON.stringify(error.httpResponse?.body ?? null)}` }));
}
