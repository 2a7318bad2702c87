"""Speed over HTTP beside `generate` and transformers' continuous batching, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from ..prompts import Prompts
from ..report import percentile
from . import models
from .scale import Scale
from .served import Served, generation, texts_of, times_of
from .tell import Tell

_COPIED = 2**31  # bytes that are copied to measure the card, far more than its caches hold
_COPIED_ON_CPU = 2**26
_COPIES = 10
_CACHE_SHARE = 0.2  # of what is free, for transformers' continuous batching: the server's own cache is there too

_FORWARD = "forward pass"  # what the profile calls the part of a step on the host until the kernels are launched

# Which kernels, by what their names hold, do what; on a CPU these are torch's operations.
_KINDS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("attention", ("attention", "flash", "fmha", "softmax", "sdpa")),
    ("products", ("gemm", "gemv", "cutlass", "cublas", "xmma", "nvjet", "aten::mm", "addmm", "linear", "splitk")),
    ("copies", ("memcpy", "memset", "copy", "cat", "index_put", "fill")),
)


def callers(root: Path, scale: Scale, tell: Tell) -> None:
    """Tokens a second and first tokens of many callers, and of a long prompt, in turn with the peers."""
    _callers(root, f"{models.ORG}/large", scale, scale.callers, scale.rounds, tell)


def larger(root: Path, scale: Scale, tell: Tell) -> None:
    """The same of a larger model, once."""
    assert scale.larger is not None  # noqa: S101 - the section is left out otherwise
    began = perf_counter()
    model_id = models.large(root, "larger", scale.larger, scale.half, scale.device)
    tell.figure("the larger model was made", seconds=perf_counter() - began)
    _callers(root, model_id, scale, scale.callers[::2], 1, tell)


def _callers(root: Path, model_id: str, scale: Scale, counts: Sequence[int], rounds: int, tell: Tell) -> None:
    rate = copy_rate(scale.device)
    tell.figure("copies on the device, read and written", gb_per_second=rate / 1e9)
    numbers = count()
    made = Prompts(root / model_id)

    def prompts(tokens: int, callers: int) -> list[str]:
        return [made.make(number, tokens) for number in islice(numbers, callers)]

    with Served(root, scale.device) as server, _peers(root / model_id, scale) as peers:
        server.register(model_id)
        began = perf_counter()
        server.load(model_id, dtype=scale.half)
        tell.figure("load", seconds=perf_counter() - began)
        limit = rate / peers.weight_bytes
        everyone: dict[str, Callable[[list[str], int], dict[str, float]]] = {
            "ours": lambda prompts, new: _ours(server, model_id, prompts, new),
            "generate": peers.generate,
            "continuous batching": peers.generate_batch,
        }
        out: dict[str, str] = {}
        for callers in counts:  # the first of each size makes kernels and memory that the later ones find
            for name, ask in everyone.items():
                if name not in out:
                    try:
                        ask(prompts(scale.prompt_tokens, callers), 4)
                    except Exception as error:
                        out[name] = f"{type(error).__name__}: {error}"[:300]
                        tell.figure(f"{name} takes no part", reason=out[name])
                        if name == "ours":  # only a peer may stay away
                            raise
        for callers in counts:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in everyone if name not in out}
            for turn in range(rounds):
                order = list(found)
                for name in order[turn % len(order) :] + order[: turn % len(order)]:
                    found[name].append(everyone[name](prompts(scale.prompt_tokens, callers), scale.speed_tokens))
            rows = {name: {key: median(each[key] for each in runs) for key in runs[0]} for name, runs in found.items()}
            for name, row in rows.items():
                share = row["tokens_per_second"] / (limit * callers)
                tell.figure(f"{callers} callers, {name}", **row, share_of_bandwidth_limit=share)
            ratios = [
                ours["tokens_per_second"] / theirs["tokens_per_second"]
                for ours, theirs in zip(found["ours"], found.get("generate", ()), strict=False)
            ]
            if ratios:
                tell.figure(f"{callers} callers, ours to generate", ratio=median(ratios))
        long = {
            name: median(everyone[name](prompts(scale.long_prompt, 1), 1)["first_token_s"] for _ in range(rounds))
            for name in everyone
            if name not in out
        }
        tell.figure(f"a prompt of {scale.long_prompt} tokens, first token", **long)


def _ours(server: Served, model_id: str, prompts: list[str], new_tokens: int) -> dict[str, float]:
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    callers = server.callers([generation(model_id, prompt, **lengths) for prompt in prompts])
    callers.start()
    streams = callers.finish()
    made = sum(texts_of(stream)[1]["usage"]["completion_tokens"] for stream in streams)
    wall = max(stream.ended for stream in streams) - min(stream.began for stream in streams)
    # Tokens without a text of their own make no event: the server's own clock tells the first one of such a stream.
    firsts = [next(times_of(stream), stream.ended - stream.began) for stream in streams]
    return {"tokens_per_second": made / wall, "first_token_s": percentile(firsts, 0.5)}


@contextmanager
def _peers(folder: Path, scale: Scale) -> Iterator[_Peers]:
    peers = _Peers(folder, scale)
    try:
        yield peers
    finally:
        peers.close()


class _Peers:
    """transformers itself in this process: a static batch, and its continuous batching. No HTTP, no streaming."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._device, self._folder, self._scale = scale.device, folder, scale
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, scale.half))
        self._model = self._model.to(scale.device).eval()
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in self._model.parameters()}
        self.weight_bytes = sum(tensors.values())

    def generate(self, prompts: list[str], new_tokens: int) -> dict[str, float]:
        """`model.generate` of a static batch."""
        import torch

        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True).to(self._device)
        asked = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        times: list[float] = []
        began = perf_counter()

        def clock(tokens: Any, _: Any, **__: Any) -> Any:
            """A stopping criterion that stops nothing: it is called after every step."""
            if not times:
                self._synchronize()
                times.append(perf_counter() - began)
            return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)

        with torch.inference_mode():
            output = self._model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=new_tokens,
                stopping_criteria=[clock],
                **asked,
            )
        self._synchronize()
        wall = perf_counter() - began
        made = (output.shape[1] - inputs["input_ids"].shape[1]) * len(prompts)
        return {"tokens_per_second": made / wall, "first_token_s": times[0]}

    def generate_batch(self, prompts: list[str], new_tokens: int) -> dict[str, float]:
        """`model.generate_batch`, transformers' continuous batching."""
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        ids = [self._tokenizer(prompt)["input_ids"] for prompt in prompts]
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        began = perf_counter()
        output = self._model.generate_batch(
            inputs=ids,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=_CACHE_SHARE),
            record_timestamps=True,
            progress_bar=False,
            persistent_manager=True,
            warmup=False,
        )
        wall = perf_counter() - began
        made = sum(len(each.generated_tokens) for each in output.values())
        firsts = [each.timestamps[0] - began for each in output.values() if each.timestamps]
        return {"tokens_per_second": made / wall, "first_token_s": percentile(firsts, 0.5)}

    def close(self) -> None:
        """Give the memory back."""
        if hasattr(self._model, "destroy_cached_continuous_batching_manager"):
            self._model.destroy_cached_continuous_batching_manager()
        del self._model

    def _synchronize(self) -> None:
        if self._device != "cpu":
            import torch

            torch.cuda.synchronize()


def copy_rate(device: str) -> float:
    """Bytes a second that a copy on the device reads and writes, together."""
    import torch

    size = _COPIED_ON_CPU if device == "cpu" else _COPIED
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    shortest = float("inf")
    for _ in range(_COPIES):
        if device == "cpu":
            began = perf_counter()
            target.copy_(source)
            seconds = perf_counter() - began
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            target.copy_(source)
            end.record()
            torch.cuda.synchronize()
            seconds = begin.elapsed_time(end) / 1000
        shortest = min(shortest, seconds)
    return 2 * size / shortest


# Where a step's time goes ---------------------------------------------------------------------------------------------


def profile(root: Path, scale: Scale, tell: Tell) -> None:
    """Decoding steps of the batch runner itself, as the engine takes them, under torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    from transformers import AutoModelForCausalLM, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

    from huggingface.engine.sampling import Sampler, sample
    from huggingface.engine.slots import SlotTable
    from huggingface.engine.torch.parity import batch_runner
    from huggingface.engine.torch.runner import Piece

    folder = root / models.ORG / "large"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, scale.half)).to(scale.device).eval()
    runner = batch_runner(model)
    table = SlotTable(runner.cache, 16 * 1024 * scale.profiled_rows)
    generator = torch.Generator().manual_seed(0)
    slots = []
    for _ in range(scale.profiled_rows):
        slot = table.take([-1], 256)
        assert slot is not None  # noqa: S101 - there is room for all
        prompt = torch.randint(10, 1000, (scale.prompt_tokens,), generator=generator).tolist()
        runner.forward([Piece(slot, prompt, 0)])
        slot.tokens.extend(prompt)
        slots.append(slot)
    slots.sort(key=lambda slot: (slot.bank.key, slot.row))
    cuda = scale.device != "cpu"

    def samplers(do_sample: bool) -> list[Sampler]:
        rules = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(50)]) if do_sample else None
        prompt = torch.ones((1, 1), dtype=torch.long, device=scale.device)
        return [Sampler(prompt, 4096, rules or LogitsProcessorList(), do_sample, None) for _ in slots]

    def step(drawing: list[Sampler]) -> None:
        with torch.profiler.record_function(_FORWARD):
            logits = runner.forward([Piece(slot, [7], len(slot.tokens)) for slot in slots])
        tokens = sample(logits, drawing, "profile")
        for slot, token in zip(slots, tokens, strict=True):
            slot.tokens.append(token)

    for name, do_sample in (("greedy", False), ("sampled", True)):
        drawing = samplers(do_sample)
        for _ in range(3):
            step(drawing)
        began = perf_counter()
        for _ in range(scale.profiled_steps):
            step(drawing)
        wall = (perf_counter() - began) / scale.profiled_steps
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profiler(activities=activities) as seen:
            for _ in range(scale.profiled_steps):
                step(drawing)
        _tell_profile(f"a step of {len(slots)} rows, {name}", seen, wall, scale, tell)
        # Alone, as in a step it waits for the forward pass.
        logits = runner.forward([Piece(slot, [7], len(slot.tokens)) for slot in slots]).clone()
        began = perf_counter()
        for _ in range(scale.profiled_steps):
            sample(logits, drawing, "profile")
        wall = (perf_counter() - began) / scale.profiled_steps
        with profiler(activities=activities) as seen:
            for _ in range(scale.profiled_steps):
                sample(logits, drawing, "profile")
        _tell_profile(f"its sampling alone, {name}", seen, wall, scale, tell)


def _tell_profile(name: str, seen: Any, wall: float, scale: Scale, tell: Tell) -> None:
    """Milliseconds a step: on the clock without the profiler, and by what its events say."""
    steps, cuda = scale.profiled_steps, scale.device != "cpu"
    spent: dict[str, float] = {kind: 0.0 for kind, _ in _KINDS} | {"rest": 0.0}
    launches, forward, launching = 0, 0.0, 0.0
    for event in seen.key_averages():
        key = str(event.key)
        if key == _FORWARD:
            forward += event.cpu_time_total
            continue
        if key.startswith(("cudaLaunch", "cuLaunch")):
            launches += event.count
            launching += event.self_cpu_time_total
        on_device = str(event.device_type).endswith("CUDA")
        if cuda and not on_device:
            continue
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        lowered = key.lower()
        kind = next((kind for kind, marks in _KINDS if any(mark in lowered for mark in marks)), "rest")
        spent[kind] += own
    busy = sum(spent.values())
    numbers = {f"{kind}_ms": value / steps / 1000 for kind, value in spent.items()}
    tell.figure(
        name,
        wall_ms=wall * 1000,
        device_busy_ms=busy / steps / 1000,
        **numbers,
        launches=launches / steps,
        launching_ms=launching / steps / 1000,
        forward_on_host_ms=forward / steps / 1000,
    )
