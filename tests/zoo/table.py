"""The results as a document: how many families are equal, by which backend, batched or not, and why each is not.

Plain data in, Markdown out. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

TITLES: Mapping[str, str] = {
    "causal": "Text generation",
    "seq2seq": "Encoder-decoders",
    "masked": "Filling masks",
    "sequence": "Classifying texts",
    "token": "Classifying tokens",
    "qa": "Answering questions",
}
BACKENDS = ("torch", "openvino")
_LONGEST = 200  # characters of a cell
_FINE = ("equal", "both fail", "both fail (500)")

Told = Mapping[str, Any]

_HEAD = """# Every text family of transformers

`make zoo` builds a tiny model with random weights of every family in six tables of `transformers` {version} (models
that generate text, encoder-decoders, masked, text classification, token classification and question answering),
serves it with torch and with OpenVINO by name, and compares every answer with what `transformers` makes of the same
folder in float32. This page is what it wrote. Windows, chunks and changed positions begin after 16 tokens, and texts
go past them.

A family that generates is asked for greedy texts of five prompts, one after the other and then all at once with one
of them twice and one that begins like another, for a text with a seed, alone and in that company, for one with three
beams, and for the log-probabilities of a text. A family of a task is asked for five inputs of unlike lengths, one
after the other, all at once, and as one list; numbers agree to 0.00001. A *near tie* is a text whose first other
token had a logit within a thousandth of the likeliest one's, as a share of their spread. What OpenVINO refuses to
compute counts with torch alone; why it does is in the tables below.
"""


def good(told: Told) -> bool:
    """Whether a family is equal in everything, on whatever it was tried."""
    fine = all(verdict(told, backend) in ("equal", "refused") for backend in tried(told))
    return fine and "refused" not in told


def tried(told: Told) -> Sequence[str]:
    """The backends that a family was tried on; where it came to none, what is told is of all."""
    return [backend for backend in BACKENDS if backend in told] or BACKENDS


def verdict(told: Told, backend: str) -> str:
    """`equal`, or what is not."""
    if "unbuildable" in told:
        return "not built"
    if "refused" in told:
        return "refused"
    if "broken" in told:
        return f"broken: {told['broken']}"
    found = told.get(backend, {"failed": "not tried"})
    if "refused" in found:
        return "refused"
    if "failed" in found:
        return f"failed: {found['failed']}"
    bad: dict[str, list[str]] = defaultdict(list)
    for name, word in found["found"].items():
        if not name.endswith(", texts") and word not in _FINE:
            bad[word].append(name)
    return "; ".join(f"{word} ({', '.join(names)})" for word, names in bad.items()) or "equal"


def render(results: Sequence[Told], notes: Mapping[tuple[str, str], str]) -> str:
    """The whole document; `notes` say why a family is not equal."""
    tables = {name: [each for each in results if each["table"] == name] for name in TITLES}
    lines = [_HEAD.format(version=metadata.version("transformers")), *_totals(tables)]
    for name, told in tables.items():
        if told:
            lines += ["", f"## {TITLES[name]}", "", *_table(name, told, notes)]
    return "\n".join(lines) + "\n"


def _totals(tables: Mapping[str, Sequence[Told]]) -> list[str]:
    lines = [
        "| | families | built | equal with torch | equal with OpenVINO | batched | answers equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, told in tables.items():
        built = [each for each in told if "unbuildable" not in each]
        counts = []
        for backend in BACKENDS:
            asked = [each for each in built if backend in each and "refused" not in each[backend]]
            counts.append(f"{sum(verdict(each, backend) == 'equal' for each in asked)} of {len(asked)}")
        batched = str(sum(_mode(each) == "batched" for each in built)) if name in ("causal", "seq2seq") else ""
        words = Counter(word for each in built for backend in BACKENDS for word in _words(each, backend))
        answers = f"{sum(words[word] for word in _FINE):,} of {words.total():,}"
        row = (TITLES[name], len(told), len(built), *counts, batched, answers)
        lines.append(f"| {' | '.join(str(cell) for cell in row)} |")
    return lines


def _words(told: Told, backend: str) -> Iterable[str]:
    found = told.get(backend, {}).get("found", {})
    return (str(word) for name, word in found.items() if not name.endswith(", texts"))


def _mode(told: Told) -> str | None:
    mode: str | None = told.get("torch", {}).get("mode")
    return mode


def _table(name: str, results: Sequence[Told], notes: Mapping[tuple[str, str], str]) -> list[str]:
    built = [each for each in results if "unbuildable" not in each]
    lines = []
    if bad := [each for each in built if not good(each)]:
        lines += ["| not equal | with torch | with OpenVINO | why |", "|---|---|---|---|"]
        for each in bad:
            cells = [_cell(verdict(each, backend)) for backend in BACKENDS]
            lines.append(f"| {each['family']} | {' | '.join(cells)} | {notes.get((name, each['family']), '')} |")
        lines.append("")
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for each in built:
        groups[_served(name, each)].append(each["family"])
    lines += ["| served | why | families |", "|---|---|---|"]
    for served, families in sorted(groups.items(), key=lambda group: -len(group[1])):
        lines.append(f"| {served[0]} | {_cell(served[1])} | {len(families)}: {', '.join(families)} |")
    if missing := [each for each in results if "unbuildable" in each]:
        lines += ["", "| not tried | why |", "|---|---|"]
        lines += [f"| {each['family']} | {_cell(each['unbuildable'])} |" for each in missing]
    return lines


def _served(name: str, told: Told) -> tuple[str, str]:
    """By what and how, and why not otherwise."""
    converted, torch = told.get("openvino", {}), told.get("torch", {})
    by = "OpenVINO or torch" if converted.get("engine") == "openvino" else "torch"
    why = [str(converted["refused"])] if "refused" in converted else []
    if "openvino" not in told and "torch" in told:
        why = ["not tried with OpenVINO"]
    how = ""
    if name in ("causal", "seq2seq"):
        how = f", {torch.get('mode')}"
        if torch.get("reason") and torch["reason"] not in why:
            why.append(str(torch["reason"]))
    return f"{by}{how}", "; ".join(filter(None, why))


def _cell(text: str) -> str:
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    return text.replace("|", "\\|").replace("\n", " ")
