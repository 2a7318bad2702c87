# /// script
# requires-python = ">=3.11"
# dependencies = ["requests==2.34.2", "httpx==0.28.1"]
# [tool.local-llm]
# environment = "sdks"
# ///
"""requests, httpx and curl on this server's own API: registering, generating, streams, errors."""

from __future__ import annotations

import json

import httpx
import requests
from _features import ADDRESS, HELLO, MODEL, TEXT_MODEL, URL, V1, command, feature, main, same, within

API = f"{URL}/api/huggingface"
BODY = {"model_id": TEXT_MODEL, "prompt": "the cat", "max_new_tokens": 5, "do_sample": False}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


@feature("requests")
def _() -> None:
    within(MODEL, [model["model_id"] for model in requests.get(f"{API}/models", timeout=60).json()["models"]])
    answer = requests.post(f"{API}/generate", json=BODY, timeout=60).json()
    assert answer["success"], answer
    with requests.post(f"{API}/generate", json={**BODY, "stream": True}, timeout=60, stream=True) as stream:
        assert any(line.startswith(b"data:") for line in stream.iter_lines())
    same(requests.get(f"{API}/models/no/such", timeout=60).status_code, 404)
    assert requests.post(ADDRESS, json={"inputs": "hi", "parameters": {"max_new_tokens": 3}}, timeout=60).ok


@feature("httpx")
async def _() -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        answer = (await client.post(f"{V1}/chat/completions", json=CHAT)).json()
        same(answer["choices"][0]["message"]["content"], HELLO)
        async with client.stream("POST", f"{V1}/chat/completions", json={**CHAT, "stream": True}) as stream:
            lines = [line async for line in stream.aiter_lines() if line]
        same(lines[-1], "data: [DONE]")


@feature("curl")
def _() -> None:
    words = ["curl", "-sS", "-H", "Content-Type: application/json", "-d"]
    told = json.loads(command([*words, json.dumps(CHAT), f"{V1}/chat/completions"]))
    same(told["choices"][0]["message"]["content"], HELLO)
    within("data: [DONE]", command([*words, json.dumps({**CHAT, "stream": True}), "-N", f"{V1}/chat/completions"]))


main()
