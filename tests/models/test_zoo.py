"""`python -m tests.zoo` on some families, each with a mechanism of its own, and the document that it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT

from tests.zoo import table

FAMILIES = {
    "causal:gemma3_text": ("batched", "openvino"),  # windows on some layers
    "causal:gemma4": ("batched", "openvino"),  # layers that differ in width, beside what reads pictures
    "causal:deepseek_v3": ("batched", None),  # latent keys and values, groups of experts
    "causal:llama4_text": ("one at a time", None),  # attention in chunks
    "causal:doge": ("one at a time", None),  # keeps the tokens of largest score
    "causal:bloom": ("one at a time", None),  # positions as slopes
    "causal:recurrent_gemma": ("one at a time", None),  # a state that its modules keep from text to text
    "causal:qwen3_next": ("one at a time", None),  # a state beside keys and values
    "causal:blt": ("one at a time", None),  # bytes in patches
    "seq2seq:t5": ("one at a time", None),
    "masked:mbart": ("one at a time", None),  # makes its decoder's text of its own one
    "masked:modernbert": ("one at a time", "openvino"),
    "sequence:gpt2": ("one at a time", "openvino"),  # reads its class off the last token
    "token:deberta-v2": ("one at a time", "openvino"),  # positions relative to each other
    "qa:xlnet": ("one at a time", None),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the families, by their names."""
    folder = tmp_path_factory.mktemp("zoo")
    command = [sys.executable, "-m", "tests.zoo", "--only", *FAMILIES]
    command += ["--results", str(folder / "told.jsonl"), "--document", str(folder / "zoo.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]
    return {f"{line['table']}:{line['family']}": line for line in lines}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_answers_as_transformers_does_by_whatever_computes_it(told: dict[str, Any], name: str) -> None:
    each = told[name]
    mode, converted = FAMILIES[name]
    assert [table.verdict(each, backend) for backend in table.BACKENDS] == [
        "equal",
        "equal" if converted else "refused",
    ]
    assert (each["torch"]["mode"], each["openvino"].get("engine")) == (mode, converted)
    assert each["diverse"] > 3, "its answers do not tell one prompt from another"


def test_the_document_tells_of_every_family_and_each_exception_has_its_reason() -> None:
    document = (ROOT / "docs" / "zoo.md").read_text("utf-8")
    parts = dict(zip(*[iter(re.split(r"^## (.*)$", document, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert set(parts) == set(table.TITLES.values())
    bare = [line for line in document.splitlines() if line.endswith("|  |")]
    assert not bare, "a family is not equal, and nothing says why"


def test_a_family_that_is_not_equal_is_told_with_what_is_not() -> None:
    """A made-up result, as a worker writes it."""
    found = {"short, alone": "equal", "long, company": "other", "long, company, texts": ["a", "b"]}
    each = {"table": "causal", "family": "made-up", "diverse": 4}
    each |= {backend: {"engine": "torch", "mode": "batched", "found": found} for backend in table.BACKENDS}
    assert table.verdict(each, "torch") == "other (long, company)"
    assert "| made-up | other (long, company) | other (long, company) | for a reason |" in table.render(
        [each], {("causal", "made-up"): "for a reason"}
    )
