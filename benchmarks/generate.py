"""The peer `model.generate`: a child process that is told prompts as lines of JSON and generates them as one batch.

There is no HTTP and no streaming in it. A row gets its tokens when the batch's step is over, so the times of the steps
are those of every row. Run as `python generate.py FOLDER`; says `{"ready": true}` when the model is loaded.
"""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter
from typing import Any


def main(folder: str) -> None:
    """Answer lines until the input ends."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may write where the answers go
    _say(answers, {"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        began = perf_counter()
        times: list[float] = []

        def clock(tokens: Any, _: Any, times: list[float] = times, began: float = began, **__: Any) -> Any:
            """A stopping criterion that stops nothing: it is called after every step."""
            times.append(perf_counter() - began)
            return torch.zeros(tokens.shape[0], dtype=torch.bool)

        inputs = tokenizer(order["prompts"], return_tensors="pt", padding=True)
        output = model.generate(
            **inputs, max_new_tokens=order["new_tokens"], do_sample=False, stopping_criteria=[clock]
        )
        prompt = inputs["input_ids"].shape[1]
        rows = [_until(row, tokenizer.eos_token_id) for row in output[:, prompt:].tolist()]
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        counts = inputs["attention_mask"].sum(1).tolist()
        answer = {"times": times, "tokens": [len(row) for row in rows], "texts": texts, "prompt_tokens": counts}
        _say(answers, {**answer, "seconds": perf_counter() - began})


def _until(row: list[int], end: int) -> list[int]:
    """A row up to its end token, with it: behind it is padding."""
    return row[: row.index(end) + 1] if end in row else row


def _say(answers: Any, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main(sys.argv[1])
