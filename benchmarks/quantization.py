"""What a model's quantization costs and gives: memory, speed and perplexity, beside float32's, all in one run.

    python -m benchmarks.quantization [MODEL_FOLDER] [--only NAME ...] [--rounds N]

Each candidate is the same model, once more in memory, served by the engine's own runner where that takes it and else by
the model's own forward pass. They take turns, so that whatever disturbs the machine disturbs all; speeds are ratios to
float32's of the same round, their median over the rounds. Candidates of packages that are not installed are left out:
those that were tried and not taken need `pip install --no-deps torchao==0.18.0 bitsandbytes==0.50.2`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from huggingface.engine.layers import NotBatchable
from huggingface.engine.slots import SMALLEST, Slot, SlotTable
from huggingface.engine.torch.parity import batch_runner
from huggingface.engine.torch.runner import BatchRunner, Piece
from huggingface.loading import quantization

from .converted_starter import MODEL_ID, bring_converted

HERE = Path(__file__).parent
ROWS = (1, 4, 16)
PREFILL = 256
PROMPT = 64
STEPS = 3  # of decoding, in each round
GROUP = 32
WINDOW = 512  # tokens of the text that the model sees at once

PLAIN = "float32, torch's own products"  # in the engine, but without products.py

Make = Callable[[Path], Any]


def _load(folder: Path, **settings: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def _ours(scheme: str, folder: Path) -> Any:
    model = _load(folder)
    quantization.quantize(model, scheme, "cpu")
    return model


def _dynamic(folder: Path) -> Any:
    """torch's own dynamic int8: deprecated, and with one scale for all rows of a batch."""
    return torch.ao.quantization.quantize_dynamic(_load(folder), {torch.nn.Linear}, dtype=torch.qint8)


def _torchao(config: str, options: dict[str, Any], folder: Path) -> Any:
    from torchao import quantization as torchao

    model = _load(folder)
    torchao.quantize_(model, getattr(torchao, config)(**options))
    return model


class PackedLinear(torch.nn.Module):
    """torch's own products with packed weights, fast in bfloat16 only; torchao's prototype of int4 on CPUs is this."""

    def __init__(self, linear: torch.nn.Linear, bits: int) -> None:
        super().__init__()
        weight, bias = linear.weight.data, linear.bias
        self.bits, self.bias = bits, bias
        if bits == 8:
            codes, scale = quantization._rounded(weight)
            self.packed, self.scales = codes, scale.bfloat16()
            return
        groups = weight.view(weight.shape[0], -1, GROUP)
        least, maximum = groups.aminmax(dim=2)
        step = ((maximum - least) / 15).clamp(min=1e-9)
        codes = ((groups - least[..., None]) / step[..., None]).round().clamp(0, 15).to(torch.int32).view(weight.shape)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scales = torch.stack([step, least + 8 * step], -1).transpose(0, 1).contiguous().bfloat16()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        rows = values.reshape(-1, values.shape[-1]).bfloat16()
        if self.bits == 8:
            product = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scales)
        else:
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales)
        product = product.view(*values.shape[:-1], -1).to(values.dtype)
        return product if self.bias is None else product + self.bias


def _torch_packed(bits: int, folder: Path) -> Any:
    model = _load(folder)
    for parent in list(model.model.modules()):  # but for the output layer
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear:
                setattr(parent, name, PackedLinear(child, bits))
    return model


def _bitsandbytes(options: dict[str, Any], folder: Path) -> Any:
    return _load(folder, quantization_config=transformers.BitsAndBytesConfig(**options), device_map="cpu")


def _packed_bytes(model: Any) -> int:
    """What `quantize_dynamic` keeps out of sight: 8-bit weights, and a scale and a zero point of 8 bytes an output."""
    layers = [each for each in model.modules() if type(each).__module__.startswith("torch.ao.nn.quantized.dynamic")]
    shapes = [(each.out_features, each.in_features) for each in layers if hasattr(each, "out_features")]
    return sum(outputs * inputs + outputs * 16 for outputs, inputs in shapes)


CANDIDATES: dict[str, tuple[str, Make]] = {
    "float32": ("torch", _load),
    PLAIN: ("torch", _load),
    "int8": ("torch", partial(_ours, "int8")),
    "int4": ("torch", partial(_ours, "int4")),
    "torch quantize_dynamic": ("torch", _dynamic),
    "torchao int8 weights": ("torchao", partial(_torchao, "Int8WeightOnlyConfig", {})),
    "torchao int8 weights and values": ("torchao", partial(_torchao, "Int8DynamicActivationInt8WeightConfig", {})),
    "torch int4pack": ("torch", partial(_torch_packed, 4)),
    "torch int8pack": ("torch", partial(_torch_packed, 8)),
    "bitsandbytes int8": ("bitsandbytes", partial(_bitsandbytes, {"load_in_8bit": True})),
    "bitsandbytes nf4": (
        "bitsandbytes",
        partial(
            _bitsandbytes,
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        ),
    ),
}


class Contestant:
    """A model, and what the engine's runner, or its own forward pass, takes for a piece of work."""

    def __init__(self, name: str, model: Any) -> None:
        self.name = name
        self.model = model
        self.bytes = quantization.tensor_bytes(model) + _packed_bytes(model)
        self.runner: BatchRunner | None = None
        self.served = "engine"
        try:
            self.runner = BatchRunner(model) if name == PLAIN else batch_runner(model)
        except NotBatchable as error:
            self.served = f"alone ({error})"

    def seconds(self) -> dict[str, float]:
        """Of one step of each number of rows, and of a prompt of 256 tokens."""
        found = {}
        for rows in ROWS:
            found[f"decode {rows}"] = self._engine(rows, PROMPT) if self.runner else self._own(rows, PROMPT)
        found[f"prefill {PREFILL}"] = self._engine(0, PREFILL) if self.runner else self._own(0, PREFILL)
        return found

    def _engine(self, rows: int, length: int) -> float:
        runner = self.runner
        assert runner is not None  # noqa: S101
        if runner.products is not None:
            for _ in range(33):  # as if nobody had used the model itself for a while: oneDNN lays the weights out
                runner.products.step()
        table = SlotTable(runner.cache, 64 * SMALLEST)
        slots: list[Slot] = []
        try:
            for _ in range(max(rows, 1)):
                slot = table.take([-1], SMALLEST)
                assert slot is not None  # noqa: S101
                slots.append(slot)
            started = time.perf_counter()
            for slot in slots:
                runner.forward([Piece(slot, range(100, 100 + length), 0)])
                slot.tokens.extend(range(100, 100 + length))
            if not rows:
                return time.perf_counter() - started
            for slot in slots:
                table.promote(slot)
            slots.sort(key=lambda slot: (slot.bank.key, slot.row))
            best = math.inf
            for _ in range(STEPS):
                started = time.perf_counter()
                runner.forward([Piece(slot, [200], len(slot.tokens)) for slot in slots])
                best = min(best, time.perf_counter() - started)
                for slot in slots:
                    slot.tokens.append(200)
            return best
        finally:
            for slot in slots:
                table.release(slot, keep=False)
            table.forget()

    def _own(self, rows: int, length: int) -> float:
        ids = torch.arange(100, 100 + length).repeat(max(rows, 1), 1)
        with torch.inference_mode():
            started = time.perf_counter()
            past = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
            best = time.perf_counter() - started
            if not rows:
                return best
            best = math.inf
            for _ in range(STEPS):
                started = time.perf_counter()
                self.model(ids[:, :1], past_key_values=past, use_cache=True)
                best = min(best, time.perf_counter() - started)
        return best

    def company(self) -> float:
        """How far a row's logits are, at most, from those that it has in a batch of 16, as a share of their spread."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(100, 5000, (16, 24), generator=generator)
        with torch.inference_mode():
            together = self.model(ids, use_cache=False).logits[:, -1].float()
            alone = torch.cat([self.model(row[None], use_cache=False).logits[:, -1].float() for row in ids])
        spread = alone.amax(-1) - alone.amin(-1)
        return float(((together - alone).abs().amax(-1) / spread).max())


def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of the text, in windows of their own."""
    lost = 0.0
    with torch.inference_mode():
        for begin in range(0, len(ids) - 1, WINDOW):
            part = ids[begin : begin + WINDOW + 1]
            logits = model(part[None, :-1], use_cache=False).logits[0].float()
            lost += torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").item()
    return math.exp(lost / (len(ids) - 1))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="default: the starter model")
    parser.add_argument("--only", nargs="+", choices=tuple(CANDIDATES), default=tuple(CANDIDATES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="of the text, at most; all of them if not given")
    arguments = parser.parse_args()
    folder = arguments.folder or bring_converted() / MODEL_ID
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text = (HERE / "perplexity.txt").read_text("utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: arguments.tokens])

    contestants: list[Contestant] = []
    told: dict[str, tuple[float, float]] = {}
    for name in dict.fromkeys(["float32", *arguments.only]):
        package, make = CANDIDATES[name]
        if find_spec(package) is None:
            print(f"{name}: {package} is not installed")
            continue
        try:
            contestant = Contestant(name, make(folder))
            if contestant.runner is not None:
                contestant.runner.restore_weights()  # have the model itself whole
            told[name] = perplexity(contestant.model, ids), contestant.company()
        except Exception as error:  # noqa: BLE001 - a candidate that does not run here is a result too
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        contestants.append(contestant)
        value, company = told[name]
        print(f"{name}: {contestant.bytes / 1e6:.0f} MB, perplexity {value:.3f}, company {company:.1e}", flush=True)
    ratios: dict[str, dict[str, list[float]]] = {each.name: {} for each in contestants}
    plain: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        base: dict[str, float] = {}
        for contestant in contestants:
            seconds = contestant.seconds()
            base = base or seconds
            for work, value in seconds.items():
                ratios[contestant.name].setdefault(work, []).append(base[work] / value)
                if contestant.name == "float32":
                    plain.setdefault(work, []).append(value)
    print(
        f"\n{len(ids)} tokens of text; torch {torch.__version__}, {arguments.threads} threads, float32 in ms: ", end=""
    )
    print(", ".join(f"{work} {statistics.median(values) * 1e3:.1f}" for work, values in plain.items()))
    works = [f"decode {rows}" for rows in ROWS] + [f"prefill {PREFILL}"]
    print(f"| | weights, MB | perplexity | row alone / in company | {' | '.join(works)} | served by |")
    print("|---" * (len(works) + 5) + "|")
    for contestant in contestants:
        value, company = told[contestant.name]
        speeds = " | ".join(f"{statistics.median(ratios[contestant.name][work]):.2f}" for work in works)
        print(
            f"| {contestant.name} | {contestant.bytes / 1e6:.0f} | {value:.2f} | {company:.0e} | {speeds} | "
            f"{contestant.served} |"
        )


if __name__ == "__main__":
    main()
