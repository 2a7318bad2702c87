"""What is measured of this server's engines, one after the other: their loads, their memory, their exactness.

Each gets a process of its own. A first load is one that finds nothing of an earlier one: it has a copy of the model's
folder. Results are plain dictionaries, as they stand in the line of JSON.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from .contestants import CONTESTANTS, ENVIRONMENTS, LocalLLM, Unavailable
from .converted_starter import FOLDER, MODEL_ID, MODELS_DIR
from .program import Watch
from .prompts import Prompts
from .report import median
from .scenarios import note, rotated

VARIANTS = ("ours-torch", "ours", "ours-int8", "ours-int4")
TEXT = Path(__file__).with_name("perplexity.txt")
WINDOW = 512  # tokens of the text that the model sees at once
_NUMBERS = 5_000_000  # of the prompts
_MIB = 1024 * 1024


# Loads ----------------------------------------------------------------------------------------------------------------


def loads(
    keys: Sequence[str], prompts: Prompts, rounds: int, callers: int, new_tokens: int, limit: float
) -> dict[str, Any]:
    """For each engine a first load and `rounds` later ones, in turn: seconds until a first token is there, and memory.

    Memory is the process's resident memory beyond what it had before the load, with everything imported.
    """
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in keys}
    failed: dict[str, str] = {}
    fresh = prompts.series(_NUMBERS, 64)
    with _copies(keys) as folders:
        for turn in range(rounds + 1):
            for key in rotated(keys, turn):
                if key in failed:
                    continue
                try:
                    result = _loaded(_made(key, folders[key]), list(islice(fresh, 1 + callers)), new_tokens, limit)
                except Unavailable as error:
                    failed[key] = str(error)
                    note(f"load {turn + 1}, {key}: {error}")
                    continue
                note(f"load {turn + 1}/{rounds + 1}, {key}: {result['first_token_s']:.1f} s")
                found[key].append(result)
    rows: list[dict[str, Any]] = []
    for key in keys:
        if len(found[key]) < 2:
            rows.append({"server": key, "left_out": failed.get(key, "not measured")})
            continue
        first, *later = found[key]
        named = {f"first_load_{name}": first[name] for name in ("first_token_s", "peak_mib", "elsewhere")}
        rows.append({"server": key, "rounds": len(later), **named, **median(later)})
    return {"callers": callers, "new_tokens": new_tokens, "rows": rows}


def _loaded(contestant: LocalLLM, prompts: list[str], new_tokens: int, limit: float) -> dict[str, Any]:
    """One load in a process of its own: its seconds, and the memory after it and after some work."""
    try:
        contestant.launch()
        if contestant.program is None:
            raise Unavailable("not started")
        sleep(1)
        idle = contestant.program.memory()
        began = perf_counter()
        with Watch(contestant.program) as watch:
            contestant.load()
            loaded = perf_counter() - began
            _answered(contestant, prompts[:1], 1, limit)
            first = perf_counter() - began
        sleep(1)  # what is given back, is given back soon
        after = contestant.program.memory()
        _answered(contestant, prompts[1:], new_tokens, limit)
        sleep(1)
        worked = contestant.program.memory()
    except OSError as error:
        raise Unavailable(f"did not load the model: {error}") from error
    finally:
        contestant.stop()
    return {
        "load_s": loaded,
        "first_token_s": first,
        "idle_mib": idle / _MIB,
        "resident_mib": (after - idle) / _MIB,
        "resident_after_work_mib": (worked - idle) / _MIB,
        "peak_mib": (watch.peak - idle) / _MIB,
        "elsewhere": watch.elsewhere,
    }


def _answered(contestant: LocalLLM, prompts: list[str], new_tokens: int, limit: float) -> None:
    for answer in contestant.ask(prompts, new_tokens, limit):
        if answer.error:
            raise Unavailable(f"did not answer: {answer.error}")


def _made(key: str, models_dir: Path = MODELS_DIR) -> LocalLLM:
    kind = CONTESTANTS[key]
    assert issubclass(kind, LocalLLM)  # noqa: S101 - VARIANTS names no other
    return kind(models_dir)


@contextmanager
def _copies(keys: Sequence[str]) -> Iterator[dict[str, Path]]:
    """A models folder for each key, with the starter model's files (as links, where that can be) and nothing else."""
    ENVIRONMENTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ENVIRONMENTS) as name:
        folders = {key: Path(name) / key for key in keys}
        for folder in folders.values():
            model = folder / MODEL_ID
            model.mkdir(parents=True)
            for path in FOLDER.iterdir():
                if path.is_file():
                    try:
                        os.link(path, model / path.name)
                    except OSError:
                        shutil.copy2(path, model / path.name)
        yield folders


# Perplexity -----------------------------------------------------------------------------------------------------------


def perplexity(keys: Sequence[str], prompts: Prompts, tokens: int, limit: float) -> dict[str, Any]:
    """Of the first `tokens` tokens of a fixed text, in windows, by the log-probabilities that the server tells."""
    ids = prompts.tokens(TEXT.read_text("utf-8"))[:tokens]
    rows: list[dict[str, Any]] = []
    for key in keys:
        contestant = _made(key)
        lost = 0.0
        try:
            contestant.start()
            for begin in range(0, len(ids) - 1, WINDOW):
                lost -= sum(contestant.log_probabilities(ids[begin : begin + WINDOW + 1], limit))
        except (Unavailable, OSError) as error:
            rows.append({"server": key, "left_out": str(error)})
            note(f"perplexity, {key}: {error}")
            continue
        finally:
            contestant.stop()
        rows.append({"server": key, "perplexity": math.exp(lost / (len(ids) - 1))})
        note(f"perplexity, {key}: {rows[-1]['perplexity']:.4f}")
    return {"tokens": len(ids), "window": WINDOW, "rows": rows}
