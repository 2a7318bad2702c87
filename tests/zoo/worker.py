"""Some families, one after the other: `python tests/zoo/worker.py OUT BACKENDS TABLE:FAMILY ...`.

Each is built, read by transformers in this process and by a real server, with torch and with OpenVINO, and what both
say is compared. A line of JSON a family goes to OUT, and one before it that says which is under way.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the models are tiny
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import families
import make
import torch
import transformers
from questions import ANSWERS, CASES, INPUTS, LOGPROBS, NEW_TOKENS, apart, seen
from reference import Reference

from benchmarks.gpu.served import API, Failed, Served

_PATIENCE = 600.0  # seconds for one call: no bound on the machine's speed
CLOSE = 1e-5  # numbers of tasks
LOGPROBS_CLOSE = 1e-3
_NEUTRAL = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


class Zoo:
    """The server that is tried, and the models' folder."""

    def __init__(self, root: Path, backends: list[str]) -> None:
        self.root, self.backends = root, backends
        self.server: Served | None = None

    def __enter__(self) -> Zoo:
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is not None:
            self.server.stop()

    def running(self) -> Served:
        """The server; another one where it has ended."""
        if self.server is not None and self.server.program.ended():
            self.server.stop()
            self.server = None
        if self.server is None:
            self.server = Served(self.root, "cpu", backend="auto")
        return self.server

    def run(self, table: str, family: str) -> dict[str, Any]:
        """All that is found out of one family."""
        model_id = f"{table}/{family}"
        folder = self.root / model_id
        told: dict[str, Any] = {"table": table, "family": family}
        try:
            told["class"] = make.build(folder, table, family)
        except make.Unbuildable as error:
            return {**told, "unbuildable": str(error)}
        try:
            reference = Reference(folder, table)
            wanted = _texts(reference) if table in ("causal", "seq2seq") else _results(reference, table)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            return {**told, "unbuildable": f"transformers itself fails: {_said(error)}"}
        if not any(not isinstance(each, str) for each in wanted.values()):
            return {**told, "unbuildable": f"transformers itself fails: {next(iter(wanted.values()))}"}
        told["diverse"] = len({str(each) for each in wanted.values()})
        server = self.running()
        try:
            server.register(model_id, families.MODEL_TYPES[table])
        except Failed as error:
            return {**told, "refused": str(error)}
        for backend in self.backends:
            try:
                told[backend] = self._compare(server, model_id, table, backend, wanted)
            except (Failed, OSError, ValueError) as error:
                told[backend] = {"failed": str(error)[:600]}
                server = self.running()
        return told

    def _compare(
        self, server: Served, model_id: str, table: str, backend: str, wanted: dict[str, Any]
    ) -> dict[str, Any]:
        began = time.monotonic()
        status, answer = server.call(
            "POST", f"{API}/models/{model_id}/load", {"backend": backend, "force_reload": True}, _PATIENCE
        )
        if status in (400, 422) and backend != "torch":
            return {"refused": _reason(str(answer.get("error")))}
        if status != 200:
            raise Failed(f"load: {status} {answer.get('error')}")
        found: dict[str, Any] = {}
        if table in ("causal", "seq2seq"):
            _ask_texts(server, model_id, wanted, found)
        else:
            _ask_results(server, model_id, table, wanted, found)
        shown = server.done("GET", f"{API}/cache")["cached_models"].get(model_id) or {}
        engine = shown.get("engine") or {}
        server.done("POST", f"{API}/models/{model_id}/unload", {})
        return {
            "engine": (shown.get("settings") or {}).get("backend"),
            "mode": engine.get("mode"),
            "reason": engine.get("reason"),
            "found": found,
            "seconds": round(time.monotonic() - began, 1),
        }


def _reason(message: str) -> str:
    """Why OpenVINO does not compute a model, without the model's name."""
    return re.sub(r"^.*?'[^']*/[^']*'[^:]*: ?|^Invalid value for field '\w+': ", "", message)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def _tried(work: Callable[[], Any]) -> Any:
    """What comes of it; a text of why not, where it raises."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - whatever transformers raises is its answer
        return _said(error)


def _texts(reference: Reference) -> dict[str, Any]:
    """What transformers writes for each case."""
    made = {case.name: _tried(partial(reference.text, case)) for case in CASES}
    if reference.table == "causal":
        made["logprobs"] = _tried(partial(reference.logprobs, LOGPROBS))
    return made


def _results(reference: Reference, table: str) -> dict[str, Any]:
    """What transformers gives for each input."""
    return {str(number): _tried(partial(reference.result, inputs)) for number, inputs in enumerate(INPUTS[table])}


def _together(server: Served, calls: list[tuple[str, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """Status and answer of calls that begin at once."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: server.call("POST", call[0], call[1], _PATIENCE), calls))


def _ask_texts(server: Served, model_id: str, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    path = f"{API}/generate"
    for company in ("alone", "company"):
        cases = [case for case in CASES if company in case.rounds]
        if company == "company":
            cases = [*cases, cases[2]]  # one of them twice
        calls = [
            (path, {"model_id": model_id, "prompt": case.prompt, "max_new_tokens": NEW_TOKENS, **_NEUTRAL,
                    **case.parameters})
            for case in cases
        ]  # fmt: skip
        answers = (
            [server.call("POST", *call, _PATIENCE) for call in calls]
            if company == "alone"
            else _together(server, calls)
        )
        for case, (status, answer) in zip(cases, answers, strict=True):
            right = wanted[case.name]
            if isinstance(right, str):
                word = "both fail" if status != 200 else "only transformers fails"
                found[f"{case.name}, {company}"] = word if status != 500 else f"{word} (500)"
            elif status != 200:
                found[f"{case.name}, {company}"] = f"{status}: {answer.get('error')}"
            else:
                word = right.compare(answer["response"])
                if word == "other" and f"{case.name}, {company}" not in found:
                    found[f"{case.name}, {company}, texts"] = [right.text, answer["response"]]
                if found.get(f"{case.name}, {company}", "equal") == "equal":
                    found[f"{case.name}, {company}"] = word
    right = wanted.get("logprobs")
    if isinstance(right, list):
        body = {"model": model_id, "prompt": LOGPROBS, "max_tokens": 0, "echo": True, "logprobs": 0}
        status, answer = server.call("POST", "/v1/completions", body, _PATIENCE)
        if status != 200:
            found["logprobs"] = f"{status}: {json.dumps(answer)[:200]}"
        else:
            numbers = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
            far = max((abs(a - b) for a, b in zip(numbers, right, strict=True)), default=0.0)
            found["logprobs"] = "equal" if far <= LOGPROBS_CLOSE else f"{far:.2g} apart"


def _ask_results(server: Served, model_id: str, table: str, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    task = families.MODEL_TYPES[table]
    calls = [
        (f"{API}/pipeline", {"model_id": model_id, "task": task, "inputs": inputs, **ANSWERS.get(table, {})})
        for inputs in INPUTS[table]
    ]
    whole = (f"{API}/pipeline", {**calls[0][1], "inputs": list(INPUTS[table])})
    made = {"alone": [server.call("POST", *call, _PATIENCE) for call in calls]}
    made["company"] = _together(server, calls)
    status, answer = server.call("POST", *whole, _PATIENCE)
    results = answer.get("results") or [None] * len(calls)
    made["list"] = [(status, {**answer, "results": each}) for each in results]
    for company, answers in made.items():
        for number, (status, answer) in enumerate(answers):
            right, name = wanted[str(number)], f"{number}, {company}"
            if company == "list":  # one that fails fails the list
                right = next((each for each in wanted.values() if isinstance(each, str)), right)
            if isinstance(right, str):
                word = "both fail" if status != 200 else "only transformers fails"
                found[name] = word if status != 500 else f"{word} (500)"
            elif status != 200:
                found[name] = f"{status}: {answer.get('error')}"
            else:
                far = apart(table, right, seen(table, answer["results"]))
                found[name] = "equal" if far <= CLOSE else f"{far:.2g} apart"


def main(arguments: list[str]) -> None:
    """Try the families that are named."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    out = Path(arguments[0])
    with (
        tempfile.TemporaryDirectory(prefix="local-llm-zoo-") as scratch,
        Zoo(Path(scratch), arguments[1].split(",")) as zoo,
    ):
        for name in arguments[2:]:
            table, family = name.split(":")
            began = time.monotonic()
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"begun": name}) + "\n")
            try:
                told = zoo.run(table, family)
            except Exception as error:  # noqa: BLE001 - the next family is tried all the same
                told = {"table": table, "family": family, "broken": _said(error)}
            told["seconds"] = round(time.monotonic() - began, 1)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")
            shutil.rmtree(Path(scratch) / table / family, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
