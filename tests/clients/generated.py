"""A client that openapi-python-client makes of `/openapi.json`: generates, lists, reads a refusal.

`python generated.py BASE_URL MODEL_ID` prints one JSON object; the generated package lies beside this file.
"""

from __future__ import annotations

import json
import sys

from local_llm_client import Client
from local_llm_client.api.inference import generate
from local_llm_client.api.models import list_models
from local_llm_client.models import ErrorAnswer, GenerateAnswer, GenerateBody, ModelsAnswer


def main(base_url: str, model_id: str) -> None:
    """Print what the model was asked with, the models, and how a refusal reads."""
    client = Client(base_url)
    generated = generate.sync(client=client, body=GenerateBody(model_id=model_id, prompt="the cat"))
    own = generate.sync(client=client, body=GenerateBody(model_id=model_id, prompt="the cat", max_new_tokens=3))
    listed = list_models.sync(client=client)
    refused = generate.sync(client=client, body=GenerateBody(model_id="no/such", prompt="the cat"))
    assert isinstance(generated, GenerateAnswer)
    assert isinstance(own, GenerateAnswer)
    assert isinstance(listed, ModelsAnswer)
    assert isinstance(refused, ErrorAnswer)
    told = {
        "succeeded": generated.success,
        "said": generated.response,
        "parameters": [generated.parameters.to_dict(), own.parameters.to_dict()],
        "models": [model.model_id for model in listed.models],
        "failed": refused.error,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:3])
