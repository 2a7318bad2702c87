"""lm-evaluation-harness scores over HTTP what its own backend scores on the same weights."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, STARTER, Server

QUESTIONS = [
    ("The capital of France is", ["Paris", "a potato", "blue and green"], 0),
    ("Two and two make", ["five", "four", "a small house"], 1),
    ("Cats like to eat", ["stones", "the sun", "fish"], 2),
    ("Water freezes into", ["ice", "bread", "a song of the summer"], 0),
]

# In a process of its own: the harness sets up logging, caches and threads as it likes.
PROGRAM = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

runs, folder = sys.argv[1:]
for backend, arguments in json.loads(runs):
    results = lm_eval.simple_evaluate(
        model=backend, model_args=arguments, tasks=["capitals"], batch_size=1, log_samples=True,
        task_manager=TaskManager(include_path=folder, include_defaults=False), bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["capitals"], key=lambda sample: sample["doc_id"])
    print("RESULT" + json.dumps([[list(answer[0]) for answer in sample["resps"]] for sample in samples]))
"""


def score(folder: Path, runs: list[tuple[str, dict[str, Any]]]) -> list[list[list[tuple[float, bool]]]]:
    """For each run, a backend of the harness and its arguments, the log-likelihoods of all choices, and whether each is
    what the model would write itself."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    environment |= {"HF_HOME": str(folder / "cache"), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(runs), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    for (backend, _), line in zip(runs, lines, strict=True):
        logging.getLogger(__name__).info("%s: %s", backend, line)
    return [json.loads(line.removeprefix("RESULT")) for line in lines]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a small task of multiple choice."""
    data = tmp_path / "capitals.jsonl"
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "capitals.yaml").write_text(
        "task: capitals\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc}]\n"
    )
    return tmp_path


def test_log_likelihoods_are_those_of_the_harness_own_backend(
    task: Path,
    start_server: Callable[..., Server],
    tmp_path: Path,
    models_dir: Path,
    starter_models_dir: Path,
    tiny: Callable[[str], str],
) -> None:
    root = tmp_path / "models"
    runs: list[tuple[str, dict[str, Any]]] = []
    for folder, model in ((models_dir, tiny("gpt2")), (starter_models_dir, STARTER)):
        (root / model).parent.mkdir(parents=True)
        (root / model).symlink_to(folder / model)
    server = start_server(LOCAL_LLM_MODELS_DIR=str(root))
    for model in (tiny("gpt2"), STARTER):
        server.add(model, "text-generation")
        address, place = f"{server.url}/v1/completions", str(root / model)
        served = {"model": model, "tokenizer": place, "base_url": address, "num_concurrent": 4, "max_length": 512}
        runs.append(("local-completions", served))
        runs.append(("hf", {"pretrained": place, "device": "cpu", "dtype": "float32", "max_length": 512}))
    scored = score(task, runs)
    for ours, theirs in (scored[:2], scored[2:]):
        assert len(ours) == len(QUESTIONS)
        for one, other in zip(ours, theirs, strict=True):
            assert [value for value, _ in one] == pytest.approx([value for value, _ in other], abs=1e-3)
            assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
    capital = [value for value, _ in scored[2][0]]
    assert max(capital) == capital[0], "the starter model knows the capital of France"
