"""Exactness: the server's texts beside `generate`'s on the same device, and its tasks beside the models themselves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..client import Callers, Request
from ..prompts import Prompts
from . import models
from .reference import Reference
from .scale import Scale
from .served import API, Served, generation, texts_of
from .tell import Tell

_LOGPROBS = {"float32": 2e-3, "bfloat16": 0.6, "float16": 0.1}  # the most that rounding moves one by
_CLOSE = 1e-4  # numbers of tasks, in float32
_SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
_FORM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def texts(root: Path, scale: Scale, tell: Tell) -> None:
    """Greedy texts of all families, alone and in a batch, in each type; then what else a text can be asked for."""
    prompts = _prompts(root, scale.rows)
    with Served(root, scale.device) as server:
        for name in models.FAMILIES:
            server.register(f"{models.ORG}/{name}")
        for dtype in scale.dtypes:
            for name in list(models.FAMILIES)[: None if dtype == "float32" else scale.half_families]:
                with tell.part(f"greedy, {name}, {dtype}"):
                    _greedy(server, root, f"{models.ORG}/{name}", dtype, prompts, scale, tell)
        _asked_otherwise(server, root, prompts, scale, tell)


def _prompts(root: Path, count: int) -> list[str]:
    """Texts of lengths all different, some longer than a window."""
    made = Prompts(root / models.ORG / "llama")
    return [made.make(number, 9 + 13 * number % 150) for number in range(count)]


def _greedy(
    server: Served, root: Path, model_id: str, dtype: str, prompts: list[str], scale: Scale, tell: Tell
) -> None:
    greedy: dict[str, Any] = {"max_new_tokens": scale.new_tokens, "suppress_tokens": list(models.NOT_CHARACTERS)}
    server.load(model_id, dtype=dtype)
    reference = Reference(root / model_id, scale.device, dtype)
    wanted = [reference.generate(prompt, do_sample=False, **greedy) for prompt in prompts]
    bodies = [generation(model_id, prompt, **greedy) for prompt in prompts]
    alone = [server.generate(**body)["response"] for body in bodies[: max(2, len(bodies) // 4)]]
    batch = [answer["response"] for answer in server.together(bodies)]
    for company, found in (("alone", alone), ("batch", batch)):
        pairs = list(zip(prompts, wanted, found, strict=False))
        counts = Counter(reference.compare(prompt, right, text, models.NOT_CHARACTERS) for prompt, right, text in pairs)
        told = {kind: counts[kind] for kind in ("equal", "near tie", "other")}
        tell.check(f"greedy, {model_id}, {dtype}, {company}", not counts["other"], **told)
    apart = _logprobs_apart(server, reference, model_id, prompts)
    tell.check(f"log-probabilities, {model_id}, {dtype}", apart <= _LOGPROBS[dtype], max_apart=apart)
    engine = server.done("GET", f"{API}/cache")["cached_models"][model_id]["engine"]
    tell.check(f"batched, {model_id}, {dtype}", engine["mode"] == "batched", reason=engine["reason"])
    reference.close()
    server.done("POST", f"{API}/models/{model_id}/unload", {})


def _logprobs_apart(server: Served, reference: Reference, model_id: str, prompts: list[str]) -> float:
    """How far the log-probabilities of prompts lie from the model's own at most, all read together."""
    plain = {"model": model_id, "max_tokens": 0, "echo": True, "logprobs": 0}
    answers = server.together([{**plain, "prompt": prompt} for prompt in prompts], "/v1/completions")
    apart = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        found = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
        apart = max(apart, *(abs(a - b) for a, b in zip(found, reference.logprobs(prompt), strict=True)))
    return apart


def _asked_otherwise(server: Served, root: Path, prompts: list[str], scale: Scale, tell: Tell) -> None:
    """Streams, seeds, beams, forms, prefixes, adapters, and other places for the model; in float32."""
    model_id = f"{models.ORG}/llama"
    greedy: dict[str, Any] = {"max_new_tokens": scale.new_tokens, "suppress_tokens": list(models.NOT_CHARACTERS)}
    server.load(model_id, dtype="float32")
    reference = Reference(root / model_id, scale.device, "float32")
    wanted = [reference.generate(prompt, do_sample=False, **greedy) for prompt in prompts]

    with tell.part("streams"):
        callers = server.callers([generation(model_id, prompt, **greedy) for prompt in prompts])
        callers.start()
        found = [texts_of(stream) for stream in callers.finish()]
        whole = [text == last["response"] for text, last in found]
        right = [text == right for (text, _), right in zip(found, wanted, strict=True)]
        tell.check("streams", all(whole) and all(right), streams=len(found), whole=sum(whole), equal=sum(right))

    with tell.part("seeds"):
        sampled = {**greedy, **_SAMPLING}
        bodies = [generation(model_id, prompt, **sampled, seed=number) for number, prompt in enumerate(prompts)]
        answers = server.together(bodies)
        right = [
            answer["response"] == reference.generate(prompt, seed=number, **sampled)
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        tell.check("seeds: the text of torch.manual_seed before generate", all(right), equal=sum(right), of=len(right))

    with tell.part("beams"):
        beams = {**greedy, "num_beams": 3}
        right = [
            server.generate(model_id, prompt, **beams)["response"]
            == reference.generate(prompt, do_sample=False, **beams)
            for prompt in prompts[:4]
        ]
        tell.check("beams", all(right), equal=sum(right), of=len(right))

    with tell.part("JSON of a schema"):
        form = {"json_schema": _FORM, "max_new_tokens": 60}
        said = [answer["response"] for answer in server.together([generation(model_id, p, **form) for p in prompts])]
        values = [json.loads(text) for text in said]
        fit = [
            set(value) == {"name", "age"} and isinstance(value["name"], str) and 0 <= value["age"] <= 99
            for value in values
        ]
        tell.check("JSON of a schema", all(fit), fit=sum(fit), of=len(fit))

    with tell.part("prefixes"):
        right, begun = [], prompts[-1]
        for _ in range(3):  # each prompt is the one before with its answer
            wanted_next = reference.generate(begun, do_sample=False, **greedy)
            right.append(server.generate(model_id, begun, **greedy)["response"] == wanted_next)
            begun += wanted_next
        asked = {"model": model_id, "input": prompts[-1], "max_output_tokens": 1}
        cached = [
            server.done("POST", "/v1/responses", asked)["usage"]["input_tokens_details"]["cached_tokens"]
            for _ in range(2)
        ]
        tell.check("prefixes are reused, and change nothing", all(right) and cached[1] > 0, equal=right, cached=cached)

    with tell.part("adapters"):
        _adapters(server, root, prompts, greedy, scale, tell)

    with tell.part("a model on the CPU beside it"):
        other = f"{models.ORG}/qwen3"
        server.load(other, device="cpu", dtype="float32")
        beside = Reference(root / other, "cpu", "float32")
        callers = Callers(
            [
                Request(server.port, f"{API}/generate", {**generation(each, prompt, **greedy), "stream": True})
                for prompt in prompts
                for each in (model_id, other)
            ],
            300,
        )
        callers.start()
        found = [texts_of(stream)[0] for stream in callers.finish()]
        here = [text == right for text, right in zip(found[::2], wanted, strict=True)]
        there = [
            text == beside.generate(prompt, do_sample=False, **greedy)
            for text, prompt in zip(found[1::2], prompts, strict=True)
        ]
        tell.check("a model on the CPU beside it", all(here) and all(there), equal=sum(here), equal_on_cpu=sum(there))
        server.done("POST", f"{API}/models/{other}/unload", {})

    with tell.part("device_map: auto"):
        answer = server.load(model_id, device_map="auto", dtype="float32")
        found = [each["response"] for each in server.together([generation(model_id, p, **greedy) for p in prompts])]
        right = [text == right for text, right in zip(found, wanted, strict=True)]
        tell.check("device_map: auto", all(right), equal=sum(right), of=len(right), device=answer["device"])
    reference.close()


def _adapters(server: Served, root: Path, prompts: list[str], greedy: dict[str, Any], scale: Scale, tell: Tell) -> None:
    """Rows of the model itself and of two adapters in one batch, each beside peft's own."""
    base, named = f"{models.ORG}/opt", models.ADAPTERS
    chosen = [None, *named]
    folder = root / f"{models.ORG}/adapted"
    if not folder.exists():
        folder.symlink_to(root / base)
    server.register(f"{models.ORG}/adapted", adapters={name: f"{models.ORG}/{name}" for name in named})
    server.load(f"{models.ORG}/adapted", dtype="float32")
    bodies, wanted = [], []
    for name in chosen:
        path = None if name is None else root / models.ORG / name
        reference = Reference(root / base, scale.device, "float32", path)
        for prompt in prompts[: max(2, len(prompts) // 3)]:
            asked = greedy if name is None else {**greedy, "adapter": name}
            bodies.append(generation(f"{models.ORG}/adapted", prompt, **asked))
            wanted.append(reference.generate(prompt, do_sample=False, **greedy))
        reference.close()
    found = [answer["response"] for answer in server.together(bodies)]
    right = [text == right for text, right in zip(found, wanted, strict=True)]
    differ = len(set(wanted)) == len(wanted)
    tell.check("adapters, mixed in one batch", all(right) and differ, equal=sum(right), of=len(right))


def tasks(root: Path, scale: Scale, tell: Tell) -> None:
    """Tasks beside the models themselves: numbers to 1e-4, texts equal."""
    prompts = _prompts(root, 6)
    with Served(root, scale.device) as server:
        types = {"feature-extraction": "feature-extraction", "text-classification": "text-classification"}
        for task in ("text-classification", "feature-extraction", "question-answering", "summarization"):
            server.register(f"{models.ORG}/{task}", types.get(task, task))
            server.load(f"{models.ORG}/{task}", dtype="float32")
        with tell.part("classification"):
            apart = _classified(server, root, prompts, scale.device)
            tell.check("classification", apart <= _CLOSE, max_apart=apart)
        with tell.part("features and embeddings"):
            features, embeddings = _embedded(server, root, prompts, scale.device)
            tell.check("features", features <= _CLOSE, max_apart=features)
            tell.check("embeddings", embeddings <= _CLOSE, max_apart=embeddings)
        with tell.part("question answering"):
            apart, same = _answered(server, root, prompts, scale.device)
            tell.check("question answering", same and apart <= _CLOSE, same_answers=same, max_apart=apart)
        with tell.part("summarization"):
            right = _summarized(server, root, prompts, scale.device)
            tell.check("summarization", all(right), equal=sum(right), of=len(right))


def _run(server: Served, task: str, inputs: Any, **parameters: Any) -> Any:
    body = {"model_id": f"{models.ORG}/{task}", "task": task, "inputs": inputs, **parameters}
    return server.done("POST", f"{API}/pipeline", body)["results"]


def _own(root: Path, task: str, auto: str, device: str) -> tuple[Any, Any]:
    import torch
    import transformers

    folder = root / models.ORG / task
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    reader = getattr(transformers, auto)
    return tokenizer, reader.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def _classified(server: Served, root: Path, texts: list[str], device: str) -> float:
    import torch

    tokenizer, model = _own(root, "text-classification", "AutoModelForSequenceClassification", device)
    found = _run(server, "text-classification", texts, top_k=3)
    apart = 0.0
    for text, scores in zip(texts, found, strict=True):
        with torch.inference_mode():
            wanted = model(**tokenizer(text, return_tensors="pt").to(device)).logits[0].softmax(-1)
        named = {each["label"]: each["score"] for each in scores}
        apart = max(apart, *(abs(named[model.config.id2label[at]] - float(value)) for at, value in enumerate(wanted)))
    return apart


def _embedded(server: Served, root: Path, texts: list[str], device: str) -> tuple[float, float]:
    import torch

    tokenizer, model = _own(root, "feature-extraction", "AutoModel", device)
    features = _run(server, "feature-extraction", texts)
    body = {"model": f"{models.ORG}/feature-extraction", "input": texts}
    vectors = [each["embedding"] for each in server.done("POST", "/v1/embeddings", body)["data"]]
    apart, vectors_apart = 0.0, 0.0
    for text, feature, vector in zip(texts, features, vectors, strict=True):
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt").to(device)).last_hidden_state[0].cpu()
        apart = max(apart, float((torch.tensor(feature[0]) - states).abs().max()))
        vectors_apart = max(vectors_apart, float((torch.tensor(vector) - states.mean(0)).abs().max()))
    return apart, vectors_apart


def _answered(server: Served, root: Path, texts: list[str], device: str) -> tuple[float, bool]:
    """The best span of each text by the logits themselves. Source: transformers 4.57.6, `QuestionAnsweringPipeline`."""
    import torch

    tokenizer, model = _own(root, "question-answering", "AutoModelForQuestionAnswering", device)
    apart, same, question = 0.0, True, "Who?"
    for text in texts:
        found = _run(server, "question-answering", {"question": question, "context": text}, align_to_words=False)
        inputs = tokenizer(question, text, return_tensors="pt", return_token_type_ids=True)
        context = torch.tensor([part == 1 for part in inputs.sequence_ids(0)])
        with torch.inference_mode():
            output = model(**inputs.to(device))
        start, end = (
            logits[0].cpu().masked_fill(~context, -torch.inf).softmax(-1)
            for logits in (output.start_logits, output.end_logits)
        )
        spans = (start[:, None] * end[None, :]).triu().tril(14)  # the longest answer has 15 tokens
        best = int(spans.argmax())
        first, last = (place - int(context.nonzero()[0]) for place in divmod(best, spans.shape[1]))
        same = same and found["answer"].strip() == text[first : last + 1].strip()
        apart = max(apart, abs(found["score"] - float(spans.max())))
    return apart, same


def _summarized(server: Served, root: Path, texts: list[str], device: str) -> list[bool]:
    import torch

    tokenizer, model = _own(root, "summarization", "AutoModelForSeq2SeqLM", device)
    asked = {"num_beams": 2, "max_length": 24, "min_length": 4, "do_sample": False}
    found = _run(server, "summarization", texts, **asked)
    right = []
    for text, answer in zip(texts, found, strict=True):
        inputs = tokenizer(text, return_tensors="pt").to(device)
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = model.generate(**inputs, **asked)
        right.append(answer["summary_text"] == tokenizer.decode(output[0], skip_special_tokens=True))
    return right
