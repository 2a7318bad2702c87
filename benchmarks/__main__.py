"""The command: `python -m benchmarks`, or `make bench`. Starts the contestants, runs the scenarios, reports."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from starter import StarterError

from . import report, scenarios, variants
from .contestants import CONTESTANTS, USUAL
from .converted_starter import FOLDER, bring_converted
from .prompts import Prompts

RESULTS = Path(__file__).with_name("results.jsonl")
SIDE_BY_SIDE = ("callers", "prompt", "join", "chat")
SCENARIOS = ("loads", "perplexity", *SIDE_BY_SIDE)


def main() -> int:
    """Run it; returns the exit status."""
    options = _options()
    try:
        bring_converted()
    except StarterError as error:
        print(f"The starter model is not there: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    prompts = Prompts(FOLDER)
    results: dict[str, Any] = {}
    field = scenarios.Field([CONTESTANTS[key]() for key in options.servers], prompts)
    try:
        _one_by_one(options, prompts, results)
        if any(name in options.scenarios for name in SIDE_BY_SIDE):
            field.start()
            _side_by_side(options, field, results)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    finally:
        field.stop()
    told = {name: value for name, value in vars(options).items() if name != "results"}
    line = report.written(report.line(field.contestants, told, results))
    print(f"\n{report.tables(results)}\n")
    if options.results is None:
        print(line)
    else:
        with options.results.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        print(f"One line was added to {options.results.name}")
    return 0


def _one_by_one(options: argparse.Namespace, prompts: Prompts, results: dict[str, Any]) -> None:
    """What is measured of this server's engines, each alone."""
    keys = [key for key in variants.VARIANTS if options.chosen is None or key in options.chosen]
    if "loads" in options.scenarios and keys:
        callers, new_tokens = (4, 16) if options.quick else (16, 128)
        results["loads"] = variants.loads(keys, prompts, options.rounds, callers, new_tokens, options.limit)
    if "perplexity" in options.scenarios and keys:
        results["perplexity"] = variants.perplexity(keys, prompts, 1000 if options.quick else 5000, options.limit)


def _side_by_side(options: argparse.Namespace, field: scenarios.Field, results: dict[str, Any]) -> None:
    """What is measured of all contestants in turn."""
    if "callers" in options.scenarios:
        results["callers"] = scenarios.callers(
            field, options.callers, options.rounds, options.prompt_tokens, options.new_tokens, options.limit
        )
    if "prompt" in options.scenarios:
        tokens = 500 if options.quick else 2000
        results["prompt"] = scenarios.long_prompt(field, options.rounds, tokens, options.limit)
    if "join" in options.scenarios:
        keys = tuple(key for key in ("ours", "ours-torch", "serve-cb") if key in options.servers)
        results["join"] = scenarios.join(
            field, keys, options.rounds, *((64, 1, 500) if options.quick else (256, 4, 2000)), options.limit
        )
    if "chat" in options.scenarios:
        turns, new_tokens = (3, 8) if options.quick else (10, 32)
        results["chat"] = scenarios.chat(field, options.rounds, turns, new_tokens, options.limit)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--servers", type=_names(tuple(CONTESTANTS)), help=f"who is measured (default: {','.join(USUAL)})"
    )
    parser.add_argument(
        "--scenarios", "--only", type=_names(SCENARIOS), default=list(SCENARIOS), help="what is measured"
    )
    parser.add_argument("--callers", type=_numbers, help="how many at once (default: 1,4,16,64)")
    parser.add_argument("--rounds", type=int, help="how often each is measured (default: 3)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of a prompt (default: 64)")
    parser.add_argument("--new-tokens", type=int, help="tokens to generate (default: 128)")
    parser.add_argument("--limit", type=float, default=240, help="most seconds of one measurement (default: 240)")
    parser.add_argument("--quick", action="store_true", help="1 round, 1 and 4 callers, 16 tokens; nothing is written")
    parser.add_argument("--results", type=Path, help=f"file that gets the line (default: {RESULTS.name} beside this)")
    options = parser.parse_args()
    options.chosen, options.servers = options.servers, options.servers or list(USUAL)
    options.callers = options.callers or ([1, 4] if options.quick else [1, 4, 16, 64])
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.new_tokens = options.new_tokens or (16 if options.quick else 128)
    if options.results is None and not options.quick:
        options.results = RESULTS
    return options


def _names(known: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: there are {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
