# /// script
# requires-python = ">=3.11"
# dependencies = ["guidellm==0.8.1"]
# [tool.local-llm]
# environment = "guidellm"
# ///
"""guidellm: a benchmark of synthetic prompts over streamed chats, by its own command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

from _features import MODEL, URL, command, feature, main

tokenizer = str(Path(os.environ["MODELS_FOLDER"]) / MODEL)


@feature("benchmark")
def _() -> None:
    words = ["guidellm", "run", "--backend", f"kind=openai_http,target={URL},model={MODEL}"]
    words += ["--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=3"]
    words += ["--tokenizer", f"kind=huggingface_auto,model={tokenizer}"]
    words += [
        "--data",
        "kind=synthetic_text,prompt_tokens=16,output_tokens=4",
        "--output",
        "kind=json,path=benchmarks.json",
    ]
    command([*words, "--disable-console"], seconds=170, HF_HUB_OFFLINE="1")
    found = json.loads(Path("benchmarks.json").read_text())
    totals = found["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["successful"] == 3, totals


main()
