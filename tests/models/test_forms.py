"""The processes that compile forms and follow them: none ends or holds up the server, or another's form."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from causal_models import build, serve
from tiny_tokenizers import TEXT, byte_level

from huggingface.errors import InvalidRequest
from huggingface.forms.compiler import CannotConstrain, Compiler, Open, Refused
from huggingface.forms.process import Limits
from huggingface.types import Constraint, GenerationRequest

CHAIN = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3000)) + '\nr3000: "a"'
REFERENCES = {
    "$ref": "#/$defs/d0",
    "$defs": {**{f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}, "d5000": {"type": "boolean"}},
}
MANY = {"properties": {f"p{i}": {"type": "string"} for i in range(10_000)}}
DEEP: Any = True
for _ in range(50_000):
    DEEP = {"anyOf": [DEEP]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer.json of bytes and some words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level(folder, ["<end>"], lambda _: None)
    return (folder / "tokenizer.json").read_text("utf-8")


@pytest.fixture
def compiler(tokenizer: str) -> Iterator[Compiler]:
    """One for that tokenizer."""
    made = Compiler(tokenizer, 512, [0])
    yield made
    made.close()


def write(form: Open, tokenizer: str, maximum: int = 400) -> str:
    """The text of the first token that may follow, and so on."""
    vocabulary = {number: text for text, number in json.loads(tokenizer)["model"]["vocab"].items()}
    text = ""
    for _ in range(maximum):
        mask = int.from_bytes(form.state().mask, "little") & ~1
        if not mask:
            break
        token = (mask & -mask).bit_length() - 1
        text += vocabulary[token]
        form.take(token)
    assert not form.state().error
    return text


def processes() -> list[psutil.Process]:
    """Those that compile and follow forms for this one."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [each] if "forms.process" in " ".join(each.cmdline()) else []
    return found


def until(true: Callable[[], bool]) -> None:
    """Wait for it."""
    while not true():
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("grammar", CHAIN),
        ("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
        ("grammar", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
        ("regex", "(" * 20_000 + "a" + ")" * 20_000),
        ("json_schema", REFERENCES),
        ("json_schema", {"$ref": "#"}),
        ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        ("json_schema", {"allOf": [{"anyOf": [{"minLength": i * j} for j in range(4)]} for i in range(12)]}),
        ("grammar", "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "x"'),
        ("json_schema", MANY),
        ("grammar", {"rules": ["start: text"], "schemas": {"text": REFERENCES}, "marks": {}, "first": ["text"]}),
    ],
    ids=[
        "chain",
        "parentheses",
        "gbnf",
        "groups",
        "references",
        "itself",
        "ring",
        "product",
        "doubling",
        "properties",
        "arguments",
    ],
)
def test_a_form_that_cannot_be_computed_is_refused_and_touches_no_other(kind: str, value: Any, tokenizer: str) -> None:
    """Too deep for the stack, endless, too large, or more work than there may be: a reason, and the others go on."""
    compiler = Compiler(tokenizer, 512, [0], Limits(compiling=0.5))
    try:
        other = compiler.open("regex", "[0-9]{5}")
        with pytest.raises(Refused, match=r"\w+ \w+"):
            compiler.open(kind, value)
        assert len(write(other, tokenizer)) == 5
        assert write(compiler.open("regex", "x{7}"), tokenizer) == "xxxxxxx"
    finally:
        compiler.close()


def test_a_form_that_takes_more_memory_than_it_may_is_refused(tokenizer: str) -> None:
    compiler = Compiler(tokenizer, 512, [0], Limits(memory=1 << 24, compiling=60))
    try:
        with pytest.raises(Refused, match="memory"):
            compiler.open("choice", [f"{number} " + "long text" * 100 for number in range(10_000)])
        assert write(compiler.open("regex", "x{7}"), tokenizer) == "xxxxxxx"
    finally:
        compiler.close()


def test_a_text_whose_next_token_takes_longer_than_it_may_ends_with_the_reason(tokenizer: str) -> None:
    """Each token of an ambiguous grammar takes longer than the one before it."""
    compiler = Compiler(tokenizer, 512, [0], Limits(step=0.02))
    try:
        form = compiler.open("grammar", 'start: s\ns: s s | "a" | ')
        other = compiler.open("regex", "x{7}")
        [letter] = [json.loads(tokenizer)["model"]["vocab"]["a"]]
        while not form.state().error:
            form.take(letter)
        assert "too long" in form.state().error
        assert write(other, tokenizer) == "xxxxxxx"
    finally:
        compiler.close()


def test_one_of_ten_thousand_texts_is_chosen(compiler: Compiler, tokenizer: str) -> None:
    """That many are promised; more are refused."""
    texts = [f"number{number}of{10_000 - number}" for number in range(10_000)]
    assert write(compiler.open("choice", texts), tokenizer) in texts
    with pytest.raises(Refused, match="10000"):
        compiler.open("choice", [*texts, "more"])


def test_a_form_that_is_closed_or_whose_client_leaves_has_no_process_any_more(compiler: Compiler) -> None:
    """Also while it computes, and while it is compiled."""
    first = compiler.open("regex", "x{7}")
    [model, form] = processes()
    form.suspend()
    first.close()
    until(lambda: not form.is_running() or form.status() == psutil.STATUS_ZOMBIE)
    assert model.is_running()
    compiler.close()
    until(lambda: not model.is_running())


def test_the_next_form_gets_new_processes_where_the_old_ones_were_ended(compiler: Compiler, tokenizer: str) -> None:
    form = compiler.open("regex", "x{7}")
    [model, _] = processes()
    os.kill(model.pid, signal.SIGKILL)
    assert write(form, tokenizer) == "xxxxxxx"
    assert write(compiler.open("regex", "y{7}"), tokenizer) == "yyyyyyy"


def test_a_form_that_ending_processes_never_took_is_opened_in_new_ones(
    compiler: Compiler, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is about to end still has a socket, and what is sent into it is lost."""
    held = compiler.open("regex", "x{7}")
    [model, _] = processes()
    model.suspend()
    send = socket.send_fds

    def send_and_end(*arguments: Any) -> int:
        monkeypatch.undo()
        sent = send(*arguments)
        model.kill()
        return sent

    monkeypatch.setattr(socket, "send_fds", send_and_end)
    assert write(compiler.open("regex", "y{7}"), tokenizer) == "yyyyyyy"
    assert write(held, tokenizer) == "xxxxxxx"


def test_a_tokenizer_that_is_not_known_is_refused() -> None:
    compiler = Compiler("{}", 512, [0])
    with pytest.raises(CannotConstrain):
        compiler.open("regex", "x")
    compiler.close()


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_no_form_keeps_the_other_rows_of_a_batch_waiting(engine: str) -> None:
    """One form's process stands still for as long as another answer takes; then its own text goes on."""
    model, tokenizer = build("llama")
    loaded = serve("llama", model, tokenizer, engine)

    begun = threading.Event()
    held_still: list[psutil.Process] = []

    def ask(constraint: Constraint | None, said: Callable[[], object] = lambda: None) -> str:
        parameters = {"do_sample": False, "max_new_tokens": 440}
        whole = ""
        for chunk in loaded.generate(
            GenerationRequest(parameters, prompt=TEXT[:40], constraint=constraint, streams=True)
        ):
            said()
            whole = chunk.whole or whole + chunk.text
        return whole

    def stop() -> None:
        """Hold the form's process, once: it has been compiled, and follows the text."""
        if not begun.is_set():
            [form] = [each for each in processes() if each.pid != first.pid]
            form.suspend()
            held_still.append(form)
            begun.set()

    try:
        assert len(ask(Constraint("regex", "[a-z]{3}"))) == 3
        until(lambda: len(processes()) == 1)
        [first] = processes()
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(ask, Constraint("regex", "[a-z]{400}"), stop)
            until(lambda: begun.is_set() or held.done())
            try:
                assert ask(None)
                assert ask(Constraint("regex", "x{7}")) == "xxxxxxx"
                assert not held.done()
            finally:
                for form in held_still:
                    form.resume()
            assert len(held.result()) == 400
        with pytest.raises(InvalidRequest, match="nested too deeply"):
            ask(Constraint("json_schema", DEEP))
    finally:
        loaded.close()
    until(lambda: not processes())
