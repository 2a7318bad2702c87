"""What transformers itself makes of the zoo's questions, from the same folder, in float32 on one thread.

Imports torch. Must not know the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import torch
import transformers
from questions import ANSWERS, NEW_TOKENS, Case, seen

TIE = 1e-3  # a share of the spread of the logits: the difference that another order of sums may make


@dataclass(frozen=True)
class Expected:
    """A text, and what its tokens add to it one by one, with how near each was to being another."""

    text: str
    steps: list[tuple[str, float]]

    def compare(self, found: str) -> str:
        """`equal`; `near tie` where the first other token had all but the same logit; else `other`."""
        if found == self.text:
            return "equal"
        for so_far, margin in self.steps:
            if not found.startswith(so_far) or (so_far == self.text and margin < TIE):
                return "near tie" if margin < TIE else "other"
        return "other"


class Reference:
    """One model, as a notebook has it."""

    def __init__(self, folder: Path, table: str) -> None:
        """Read it as what its own config says that it is.

        Raises: what transformers raises; RuntimeError where the files do not have all of its weights.
        """
        config = transformers.AutoConfig.from_pretrained(folder)
        [name] = config.architectures
        self.table = table
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        read = getattr(transformers, name).from_pretrained
        self.model, told = read(folder, dtype=torch.float32, output_loading_info=True)
        self.model.eval()
        if told["missing_keys"]:
            raise RuntimeError(f"its own files lack {sorted(told['missing_keys'])[:3]}")
        self.pipeline: Any = None
        if table in ("masked", "sequence", "token"):
            self.pipeline = transformers.pipeline(
                families.MODEL_TYPES[table], model=self.model, tokenizer=self.tokenizer, device="cpu"
            )

    @torch.inference_mode()
    def text(self, case: Case) -> Expected:
        """A text, written as the case says."""
        inputs = self.tokenizer(case.prompt, return_tensors="pt")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        parameters: dict[str, Any] = {"do_sample": False, "num_beams": 1, **case.parameters}
        if (seed := parameters.pop("seed", None)) is not None:
            torch.manual_seed(seed)
        output = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
            **parameters,
        )
        made = output.sequences[0]
        whole = self.table == "seq2seq" and self.model.config.is_encoder_decoder
        made = made[1:] if whole else made[ids.shape[1] :]
        steps = []
        if parameters["num_beams"] == 1:
            for at in range(len(made)):
                logits = output.logits[at][0].float()
                finite = logits[logits.isfinite()]
                first, second = finite.topk(2).values
                margin = float((first - second) / (finite.max() - finite.min()).clamp(min=1e-9))
                steps.append((self._decode(made[: at + 1]), margin))
        return Expected(self._decode(made), steps)

    def _decode(self, ids: Any) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @torch.inference_mode()
    def logprobs(self, text: str) -> list[float]:
        """The log-probability of each token of a text but the first."""
        inputs = self.tokenizer(text, return_tensors="pt")
        ids = inputs["input_ids"]
        # At the positions that `generate` gives tokens: some forward passes that are told none count from elsewhere.
        counted = families.takes(self.model, "position_ids") and not type(self.model.config).sub_configs
        where = {"position_ids": torch.arange(ids.shape[1])[None]} if counted else {}
        output = self.model(input_ids=ids, attention_mask=inputs["attention_mask"], **where)
        logits = output.logits[0, :-1].float()
        return [float(value) for value in logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]]

    @torch.inference_mode()
    def result(self, inputs: Any) -> list[tuple[str, float]]:
        """The numbers of a task by their names, of one input."""
        if self.pipeline is not None:
            return seen(self.table, self.pipeline(inputs, **ANSWERS.get(self.table, {})))
        return self._answer(inputs)

    def _answer(self, inputs: Any) -> list[tuple[str, float]]:
        """The best span of a text. Source: transformers 4.57.6, `QuestionAnsweringPipeline`."""
        read = self.tokenizer(
            inputs["question"], inputs["context"], return_tensors="pt", return_token_type_ids=True,
            return_offsets_mapping=True,
        )  # fmt: skip
        context = torch.tensor([part == 1 for part in read.sequence_ids(0)])
        context |= read["input_ids"][0] == self.tokenizer.cls_token_id  # stands for no answer
        offsets = read["offset_mapping"][0].tolist()
        names = [name for name in self.tokenizer.model_input_names if name in read and families.takes(self.model, name)]
        output = self.model(**{name: read[name] for name in names})
        start, end = (
            logits[0].float().masked_fill(~context, -10000.0).softmax(-1)
            for logits in (output.start_logits, output.end_logits)
        )
        start[0] = end[0] = 0
        spans = (start[:, None] * end[None, :]).triu().tril(14)  # the longest answer has 15 tokens
        first, last = divmod(int(spans.argmax()), spans.shape[1])
        return [(f"{offsets[first][0]}-{offsets[last][1]}", float(spans.max()))]
