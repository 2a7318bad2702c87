"""What transformers itself gives: the measure of exactness, on the same device as the server.

Imports torch and transformers. Must not know the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# How far two logits may lie apart, as a share of their spread, to count as a near tie: what rounding moves them by.
_TIE = {"float32": 0.0, "bfloat16": 0.04, "float16": 0.008}


class Reference:
    """One model, as a notebook has it."""

    def __init__(self, folder: Path, device: str, dtype: str, adapter: Path | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        self.model = model.to(device).eval()
        self._device, self._dtype = device, dtype

    def generate(self, prompt: str, seed: int | None = None, **parameters: Any) -> str:
        """The new text of one prompt."""
        import torch

        inputs = self.tokenizer(prompt, return_tensors="pt").to(self._device)
        if seed is not None:
            torch.manual_seed(seed)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **parameters
            )
        return str(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    def logprobs(self, text: str) -> list[float]:
        """The log-probability of each token of a text but the first."""
        import torch

        ids = self.tokenizer(text, return_tensors="pt").to(self._device)["input_ids"]
        with torch.inference_mode():
            logits = self.model(input_ids=ids).logits[0, :-1].float()
        return [float(value) for value in logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]]

    def compare(self, prompt: str, wanted: str, found: str, suppressed: Sequence[int]) -> str:
        """`equal`; `near tie` where the first other token had nearly the same logit; else `other`."""
        import torch

        if found == wanted:
            return "equal"
        same = next(
            (place for place, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
            min(len(found), len(wanted)),
        )
        ids = self.tokenizer(prompt + wanted[:same], return_tensors="pt").to(self._device)["input_ids"]
        with torch.inference_mode():
            logits = self.model(input_ids=ids).logits[0, -1].float()
        logits[list(suppressed)] = -torch.inf
        ends = [
            self.tokenizer.eos_token_id if len(text) == same else self.tokenizer(text[same])["input_ids"][0]
            for text in (wanted, found)
        ]
        finite = logits[logits.isfinite()]
        apart = float((logits[ends[0]] - logits[ends[1]]).abs() / (finite.max() - finite.min()))
        return "near tie" if apart <= _TIE[self._dtype] else "other"

    def close(self) -> None:
        """Give the memory back."""
        import torch

        del self.model
        if self._device != "cpu":
            torch.cuda.empty_cache()
