"""How much is tried on which device: a GPU for minutes, a CPU small, so that the program itself stays tried."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama's size. With 32 heads of 64 and a vocabulary of 128,256 it is Llama 3.2 1B, 1.24 billion parameters."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    context: int = 8192


@dataclass(frozen=True)
class Scale:
    """What is measured on a device."""

    device: str
    dtypes: tuple[str, ...]  # of the exactness of greedy texts
    half: str  # the type of the large models' weights
    half_families: int  # how many families are tried in other types than float32
    rows: int  # prompts of a family
    new_tokens: int
    large: Shape
    larger: Shape | None  # where time is left
    callers: tuple[int, ...]
    rounds: int
    prompt_tokens: int
    speed_tokens: int  # new ones, of each caller
    long_prompt: int
    load_rounds: int
    profiled_steps: int
    profiled_rows: int
    many: int  # callers at once in the section on robustness


GPU = Scale(
    device="cuda",
    dtypes=("float32", "bfloat16", "float16"),
    half="bfloat16",
    half_families=8,
    rows=16,
    new_tokens=32,
    large=Shape(2048, 8192, 16, 32, 8, 128_256),
    larger=Shape(4096, 14_336, 32, 32, 8, 32_768),
    callers=(1, 4, 16, 64),
    rounds=2,
    prompt_tokens=64,
    speed_tokens=128,
    long_prompt=2000,
    load_rounds=20,
    profiled_steps=20,
    profiled_rows=16,
    many=64,
)

CPU = Scale(
    device="cpu",
    dtypes=("float32", "bfloat16"),
    half="bfloat16",
    half_families=2,
    rows=6,
    new_tokens=12,
    large=Shape(256, 768, 4, 4, 2, 24_000, 2048),
    larger=None,
    callers=(1, 4),
    rounds=1,
    prompt_tokens=64,
    speed_tokens=12,
    long_prompt=400,
    load_rounds=4,
    profiled_steps=4,
    profiled_rows=4,
    many=16,
)


def scale_of(device: str) -> Scale:
    """What is measured on this device (`cpu`, `cuda`)."""
    return CPU if device == "cpu" else GPU
