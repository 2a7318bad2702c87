"""From answers to numbers, and from numbers to tables and one line of JSON. Nothing here measures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from statistics import median as middle
from typing import Any

import psutil

from .contestants import CONTESTANTS, ROOT, Answer, Contestant

_GIB = 1024**3
_BUSY = 0.1  # more of all cores than this, taken by others, spoils a measurement


# Numbers --------------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else 0.0


def summary(answers: list[Answer]) -> dict[str, Any]:
    """What callers who began at once got, all together. Tokens count as they were really made."""
    tokens = sum(answer.tokens or 0 for answer in answers)
    wall = max(answer.ended for answer in answers) - min(answer.began for answer in answers)
    firsts = [answer.first for answer in answers if answer.first is not None]
    gaps = [gap for answer in answers for gap in answer.gaps]
    return {
        "tokens_per_second": tokens / wall,
        "tokens": tokens,
        "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in answers),
        "ended_early": sum(answer.finish != "length" for answer in answers),
        "first_token_p50_ms": percentile(firsts, 0.5) * 1000,
        "first_token_p99_ms": percentile(firsts, 0.99) * 1000,
        "gap_p50_ms": percentile(gaps, 0.5) * 1000,
        "gap_p99_ms": percentile(gaps, 0.99) * 1000,
    }


def gap_summary(gaps: list[float]) -> dict[str, float]:
    """The times between tokens, and how far the slowest are from the usual one."""
    usual, slow = percentile(gaps, 0.5), percentile(gaps, 0.99)
    return {"gap_p50_ms": usual * 1000, "gap_p99_ms": slow * 1000, "p99_over_p50": slow / usual if usual else 0.0}


def median(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number over rounds."""
    return {name: middle(result[name] for result in results) for name in results[0]}


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float] | None:
    """Ours over theirs in the same round, the median of the rounds that both have."""
    pairs = list(zip(ours, theirs, strict=False))
    if not pairs:
        return None
    names = ("tokens_per_second", "first_token_p50_ms", "gap_p50_ms")
    return {name: middle(one[name] / other[name] for one, other in pairs if other[name]) for name in names}


# Who and where --------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What this machine is."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / _GIB, 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def line(contestants: list[Contestant], options: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """The whole run, as one object."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": machine(),
        "load_average": os.getloadavg(),
        "versions": {one.key: one.versions() for one in contestants},
        "options": options,
        **results,
    }


def written(result: dict[str, Any]) -> str:
    """One line of JSON, with short numbers and without this machine's paths."""
    text = json.dumps(_rounded(result), ensure_ascii=False)
    return text.replace(str(ROOT), ".").replace(str(Path.home()) + "/", "~/")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3 if abs(value) < 100 else 1)
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)  # noqa: S607
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# Tables ---------------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> str:
    """All that was measured, to read."""
    labels = {key: kind().name for key, kind in CONTESTANTS.items()}
    parts = []
    if "callers" in results:
        parts += [_callers_table(results["callers"], labels), _speeds(results["callers"], labels)]
    if "prompt" in results:
        parts.append(_prompt_table(results["prompt"], labels))
    if "join" in results:
        parts.append(_join_table(results["join"], labels))
    if "chat" in results:
        parts.append(_chat_table(results["chat"]))
    if "loads" in results:
        parts.append(_loads_table(results["loads"], labels))
    if "perplexity" in results:
        parts.append(_perplexity_table(results["perplexity"], labels))
    return "\n\n".join(parts)


def _callers_table(result: dict[str, Any], labels: dict[str, str]) -> str:
    head = ["callers", "server", "tokens/s", "to generate", "to llama.cpp", "first token ms p50", "p99"]
    head += ["between tokens ms p50", "p99", "memory MiB", "tokens", "same as generate", "load elsewhere"]
    rows = []
    for row in result["rows"]:
        start = [str(row["callers"]), labels[row["server"]]]
        if "left_out" in row:
            rows.append([*start, "-", f"({row['left_out'][:60]})"])
            continue
        same = row["same_text_as_generate"]
        rows.append(
            [
                *start,
                f"{row['tokens_per_second']:.1f}",
                *(_ratio(row["over"].get(name)) for name in ("generate", "llama-cpp")),
                *(f"{row[name]:.0f}" for name in ("first_token_p50_ms", "first_token_p99_ms")),
                *(f"{row[name]:.0f}" for name in ("gap_p50_ms", "gap_p99_ms")),
                str(row["memory_mib"]),
                f"{row['tokens']:.0f}/{row['expected_tokens']}",
                f"{same[0]}/{same[1]}" if same else "-",
                f"{row['elsewhere']:.0%}",
            ]
        )
    title = f"{result['prompt_tokens']} prompt tokens, {result['new_tokens']} new ones, greedy, float32 where not said"
    return f"{title}\n\n{_table(head, rows)}{_warning(result['rows'])}"


def _warning(rows: list[dict[str, Any]]) -> str:
    busy = sum(row.get("elsewhere", 0) > _BUSY for row in rows)
    return f"\n\nThe machine was busy with something else in {busy} of these rows: do not trust them." if busy else ""


def _speeds(result: dict[str, Any], labels: dict[str, str]) -> str:
    """Tokens/s by callers, and in brackets how many times `generate`'s, in Markdown."""
    by_place = {(row["callers"], row["server"]): row for row in result["rows"]}
    counts = list(dict.fromkeys(row["callers"] for row in result["rows"]))
    servers = list(dict.fromkeys(row["server"] for row in result["rows"]))

    def cell(count: int, server: str) -> str:
        row = by_place[count, server]
        if "left_out" in row:
            return "-"
        speed, over = f"{row['tokens_per_second']:.1f}", row["over"].get("generate")
        return speed if over is None or server == "generate" else f"{speed} ({over:.2f})"

    rows = [[str(count), *(cell(count, server) for server in servers)] for count in counts]
    return _markdown(["callers", *(labels[server] for server in servers)], rows)


def _prompt_table(result: dict[str, Any], labels: dict[str, str]) -> str:
    rows = []
    for row in result["rows"]:
        start = [labels[row["server"]]]
        if "left_out" in row:
            rows.append([*start, f"- ({row['left_out'][:60]})", *["-"] * 3])
            continue
        over = (_ratio(row["over"].get(name)) for name in ("generate", "ours-torch"))
        rows.append([*start, f"{row['first_token_p50_ms'] / 1000:.2f}", *over, f"{row['elsewhere']:.0%}"])
    title = f"A prompt of {result['prompt_tokens']} tokens: seconds to the first token, and how many times another's"
    head = ["", "first token s", "of generate", "of our torch", "load elsewhere"]
    return f"{title}\n\n{_markdown(head, rows)}{_warning(result['rows'])}"


def _loads_table(result: dict[str, Any], labels: dict[str, str]) -> str:
    names = ("resident_mib", "resident_after_work_mib", "peak_mib", "first_load_peak_mib")
    first: dict[str, Any] = next((row for row in result["rows"] if "left_out" not in row), {})
    rows = []
    for row in result["rows"]:
        if "left_out" in row:
            rows.append([labels[row["server"]], f"- ({row['left_out'][:60]})", *["-"] * (len(names) + 2)])
            continue
        cells = [f"{row['first_load_first_token_s']:.1f}", f"{row['first_token_s']:.1f}"]
        for name in names:
            cells.append(f"{row[name]:.0f} ({row[name] / first[name]:.2f})")
        rows.append([labels[row["server"]], *cells, f"{row['elsewhere']:.0%}"])
    title = (
        f"Loads, until the first token is there; resident MiB of the process beyond those before the load, after "
        f"it and after {result['callers']} callers with {result['new_tokens']} new tokens each; in brackets the share "
        "of the first row's"
    )
    head = ["", "first load s", "later loads s", "resident", "after work", "peak in later loads", "in the first load"]
    return f"{title}\n\n{_markdown([*head, 'load elsewhere'], rows)}{_warning(result['rows'])}"


def _perplexity_table(result: dict[str, Any], labels: dict[str, str]) -> str:
    first = next((row["perplexity"] for row in result["rows"] if "left_out" not in row), 1.0)
    rows = []
    for row in result["rows"]:
        if "left_out" in row:
            rows.append([labels[row["server"]], f"- ({row['left_out'][:60]})", "-"])
        else:
            value = row["perplexity"]
            rows.append([labels[row["server"]], f"{value:.4f}", f"{value / first - 1:+.2%}"])
    title = f"Perplexity on {result['tokens']} tokens, in windows of {result['window']}"
    return f"{title}\n\n{_markdown(['', 'perplexity', 'to the first row'], rows)}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("| --- ", "|---").replace("--- |", "---|")


def _join_table(result: dict[str, Any], labels: dict[str, str]) -> str:
    head = ["server", "between tokens ms p50", "p99", "p99/p50", "while joining: p50", "p99", "p99/p50"]
    head += ["joined", "their first token s"]
    rows = []
    for row in result["rows"]:
        if "left_out" in row:
            rows.append([labels.get(row["server"], row["server"]), "-", f"({row['left_out'][:60]})"])
            continue
        cells = [labels[row["server"]]]
        for end in ("", "_while_joining"):
            cells += [
                f"{row[f'gap_p50_ms{end}']:.0f}",
                f"{row[f'gap_p99_ms{end}']:.0f}",
                f"{row[f'p99_over_p50{end}']:.2f}",
            ]
        rows.append([*cells, f"{row['joined']:.0f}", f"{row['joiner_first_token_s']:.1f}"])
    title = (
        f"4 callers stream {result['new_tokens']} tokens while prompts of {result['joiner_tokens']} tokens join them"
    )
    return f"{title}\n\n{_table(head, rows)}"


def _chat_table(result: dict[str, Any]) -> str:
    if "left_out" in result:
        return f"A chat's turns: - ({result['left_out'][:100]})"
    head = ["turn", "prompt tokens", "of them new", "first token ms", "ms per new token"]
    rows = [
        [
            f"{row['turn']}",
            f"{row['prompt_tokens']:.0f}",
            f"{row['new_prompt_tokens']:.0f}",
            f"{row['first_token_ms']:.0f}",
            f"{row['ms_per_new_token']:.2f}",
        ]
        for row in result["rows"]
    ]
    title = f"A chat's turns, Local LLM: the last costs {result['last_over_first']:.2f} of the first, per new token"
    return f"{title}\n\n{_table(head, rows)}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Rows under a head; a row that is shorter may run on over the empty cells."""
    full = [row for row in rows if len(row) == len(head)]
    first = max((index for index in (0, 1) if head[index] == "server"), default=0)
    widths = [max(len(row[index]) for row in [head, *full]) for index in range(len(head))]
    widths[first] = max(len(row[first]) for row in [head, *rows])
    lines = []
    for row in [head, *rows]:
        cells = []
        for index, cell in enumerate(row):
            runs_on = len(row) < len(head) and index == len(row) - 1
            cells.append(
                cell if runs_on else cell.ljust(widths[index]) if index == first else cell.rjust(widths[index])
            )
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
