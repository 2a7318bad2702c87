"""The API document's Python client, as a program: registers a model, generates with it, lists the models.

`python client.py BASE_URL MODEL_ID` prints one JSON object with the three answers. It needs only `requests`, and knows
nothing of the server's code.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import requests


class HuggingFaceClient:
    """Calls three routes, and returns their bodies."""

    def __init__(self, base_url: str = "http://localhost:5000") -> None:
        self.base_url = f"{base_url}/api/huggingface"

    def add_model(self, model_id: str, name: str, model_type: str, **kwargs: Any) -> dict[str, Any]:
        """Register a model; `kwargs` are further fields of the body."""
        data = {"model_id": model_id, "name": name, "model_type": model_type, **kwargs}
        return requests.post(f"{self.base_url}/models", json=data, timeout=60).json()

    def generate_text(self, model_id: str, prompt: str, **params: Any) -> dict[str, Any]:
        """Generate; `params` are generation parameters."""
        data = {"model_id": model_id, "prompt": prompt, **params}
        return requests.post(f"{self.base_url}/generate", json=data, timeout=120).json()

    def list_models(self, model_type: str | None = None) -> dict[str, Any]:
        """List all models, or those of one type."""
        params = {"type": model_type} if model_type else {}
        return requests.get(f"{self.base_url}/models", params=params, timeout=60).json()


def main(base_url: str, model_id: str) -> None:
    """Do what the document's usage example does, and list the models too."""
    client = HuggingFaceClient(base_url)
    added = client.add_model(model_id=model_id, name="GPT-2", model_type="text-generation")
    generated = client.generate_text(model_id=model_id, prompt="The future is", max_new_tokens=50)
    listed = client.list_models(model_type="text-generation")
    print(json.dumps({"added": added, "generated": generated, "response": generated["response"], "listed": listed}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
