// The API document's JavaScript client, as a program: registers a model and generates with it.
// `node client.mjs BASE_URL MODEL_ID` prints one JSON object with both answers. It needs only Node's own fetch.

class HuggingFaceClient {
  constructor(baseUrl = "http://localhost:5000") {
    this.baseUrl = `${baseUrl}/api/huggingface`;
  }

  async addModel(modelId, name, modelType, options = {}) {
    return this.#post("/models", { model_id: modelId, name, model_type: modelType, ...options });
  }

  async generateText(modelId, prompt, params = {}) {
    return this.#post("/generate", { model_id: modelId, prompt, ...params });
  }

  async #post(path, body) {
    const response = await fetch(`${this.baseUrl}${path}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    return response.json();
  }
}

const [baseUrl, modelId] = process.argv.slice(2);
const client = new HuggingFaceClient(baseUrl);
const added = await client.addModel(modelId, "GPT-2", "text-generation", { description: "Added by JavaScript" });
const generated = await client.generateText(modelId, "Hello world", { max_new_tokens: 30 });
console.log(JSON.stringify({ added, generated, response: generated.response }));
