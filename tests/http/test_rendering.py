"""Chat templates: laid out as transformers lays them out, and held to limits, whatever their author wrote."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from changed_models import copy
from chat_families import TEMPLATES
from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from huggingface.rendering import Renderer, TemplateLimit

CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "now", "arguments": {"zone": "Österreich", "n": 1}}}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Wie spät ist es? <b>&"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "hm", "thinking": "hm"},
    {"role": "tool", "name": "now", "tool_call_id": "abcdefghi", "content": "12:00"},
]
TOOLS = [{"type": "function", "function": {"name": "now", "description": "Tells.", "parameters": {"type": "object"}}}]
DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = MORE %}{% endfor %}{{ ns.x }}"
HOSTILE = {
    "a loop without an end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a product": "{{ 'a' * 10**9 }}",
    "a number": "{{ 10**(10**9) % 7 }}",
    "a string that doubles": DOUBLED.replace("START", "'word'").replace("MORE", "ns.x ~ ns.x"),
    "a list that doubles": DOUBLED.replace("START", "['word']").replace("MORE", "[ns.x, ns.x]"),
    "much text": "{% for i in range(99999) %}{{ 'word' * 50 }}{% endfor %}",
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    """Processes of these tests' own, with little patience."""
    one = Renderer(seconds=1)
    yield one
    one.close()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_laid_out_as_transformers_does_it(renderer: Renderer, name: str) -> None:
    """Whatever the family's template, with tools, documents and special tokens."""
    values = {"messages": CHAT, "tools": TOOLS, "documents": [{"title": "a", "text": "b"}], "bos_token": "<s>"}
    for chat in (CHAT, CHAT[:1]):
        given = {**values, "messages": chat, "add_generation_prompt": len(chat) == 1}
        expected = chat_template_utils._cached_compile_jinja_template(TEMPLATES[name]).render(**given)
        assert renderer.render(TEMPLATES[name], given) == expected


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_template_without_an_end_or_a_measure_is_given_up(renderer: Renderer, template: str) -> None:
    """It takes its own request only, and the next chat is laid out."""
    with pytest.raises(TemplateLimit, match=r"seconds|memory|characters"):
        renderer.render(template, {"messages": CHAT})
    assert renderer.render("{{ messages[0].role }}", {"messages": CHAT}) == "user"


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        ("{{ raise_exception('no system') }}", TemplateError, "^no system$"),
        ("{{ unheard.of.it }}", TemplateError, "'unheard' is undefined"),
        ("{{ 1 + 'a' }}", TypeError, "unsupported operand"),
        ("{{ 1 / 0 }}", TemplateError, "division by zero"),
        ("{% for %}", TemplateError, "Expected an expression"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", RecursionError, "without an end"),
        ("{{ " + "(" * 20_000 + ")" * 20_000 + " }}", RecursionError, "nested too deeply"),
    ],
)
def test_what_a_template_says_is_told(renderer: Renderer, template: str, error: type[Exception], words: str) -> None:
    """Its own refusals and its faults are errors that a caller can name."""
    with pytest.raises(error, match=words):
        renderer.render(template, {"messages": CHAT})


def test_a_template_without_an_end_keeps_no_other_waiting(renderer: Renderer) -> None:
    """Others are laid out meanwhile, and its own chats come to their end one after the other."""
    refused: list[TemplateLimit] = []

    def loop() -> None:
        with pytest.raises(TemplateLimit) as failure:
            renderer.render(HOSTILE["a loop without an end"], {})
        refused.append(failure.value)

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert [renderer.render(f"{number}{{{{ x }}}}", {"x": 1}) for number in range(20)] == [f"{n}1" for n in range(20)]
    for thread in threads:
        thread.join()
    assert len(refused) == 2


def test_a_hostile_template_is_a_400_and_the_server_goes_on(
    client: Any, models_dir: Path, tiny: Callable[[str], str]
) -> None:
    """The model's other requests are answered, and so are other models' chats."""
    tiny("llama")
    folder = copy(models_dir, "llama", "hostile/large")
    (folder / "chat_template.jinja").write_text(HOSTILE["a product"])
    for model_id in ("hostile/large", "tiny/llama"):
        body = {"model_id": model_id, "name": "x", "model_type": "conversational"}
        assert client.post("/api/huggingface/models", json=body).status_code == 200

    def ask(path: str, model_id: str, **body: Any) -> Any:
        return client.post(f"/v1/{path}", json={"model": model_id, "max_tokens": 2, **body})

    refused = ask("chat/completions", "hostile/large", messages=CHAT[:1])
    assert refused.status_code == 400
    assert "template of model 'hostile/large' says: it takes too much memory" in refused.json["error"]["message"]
    turn = {"model_id": "hostile/large", "task": "text-generation", "inputs": CHAT[:1]}
    refused = client.post("/api/huggingface/pipeline", json=turn)
    assert refused.status_code == 400
    assert "it takes too much memory" in refused.json["error"]
    assert ask("completions", "hostile/large", prompt="a").status_code == 200
    assert ask("chat/completions", "tiny/llama", messages=CHAT[:1]).status_code == 200


def test_a_template_as_long_as_a_book_is_refused_with_its_model(
    client: Any, models_dir: Path, tiny: Callable[[str], str]
) -> None:
    """At registering and at the load."""
    tiny("llama")
    folder = copy(models_dir, "llama", "hostile/book")
    (folder / "chat_template.jinja").write_text("a" * (1 << 20) + "{{ messages }}")
    body = {"model_id": "hostile/book", "name": "x", "model_type": "conversational"}
    added = client.post("/api/huggingface/models", json=body).json
    assert "its chat template is longer than" in added["model"]["details"]["problem"]
    loaded = client.post("/api/huggingface/models/hostile/book/load", json={})
    assert "its chat template is longer than" in loaded.json["error"]
    assert loaded.status_code == 422
