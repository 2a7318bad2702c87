"""Chat templates in the shape of the families' own, written afresh: how each lays out tools, calls, results, reasoning.

`written` is what a model of the family answers by its template: what an assistant's message becomes in a history.
`build` makes a tiny model with such a template, the family's marks being special tokens, as in the real vocabularies.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from tiny_tokenizers import CHATML, byte_level
from tokenizers import processors

from huggingface.chat import formats
from huggingface.chat.formats import ReasoningTags, ToolFormat

_CONTEXT = 2048  # the tools alone are some hundred tokens of a tiny vocabulary
_LOOP = "{% for message in messages %}"
_END = "{% endfor %}"
_TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
_CHATML_HEAD = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "%HOW%<|im_end|>\n{% endif %}" + _LOOP + "{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}"
)
_CHATML_TAIL = (
    "<|im_end|>\n{% elif message.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ message.content }}\n"
    "</tool_response><|im_end|>\n{% else %}" + _TURN + "{% endif %}" + _END + "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)
_CALLS = "{% for call in message.tool_calls or [] %}"
_ARGUMENTS = "{% for key, value in call.function.arguments.items() %}"
_VALUE = "{{ value if value is string else value | tojson }}"


def _chatml(how: str, calls: str) -> str:
    return _CHATML_HEAD.replace("%HOW%", how) + calls + _CHATML_TAIL


def _roles(head: str, said: str, calls: str, begin: str, end: str) -> str:
    """A template whose turns stand between `begin` (with `ROLE` in it) and `end`."""
    turn = begin.replace("ROLE", "{{ message.role }}") + "{{ message.content }}" + end
    answer = begin.replace("ROLE", "assistant") + said + calls + end
    prompt = "{% if add_generation_prompt %}" + begin.replace("ROLE", "assistant") + "{% endif %}"
    return f"{head}{_LOOP}{{% if message.role == 'assistant' %}}{answer}{{% else %}}{turn}{{% endif %}}{_END}{prompt}"


_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
_SAID = "{{ message.content }}"
_THOUGHT = "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"

TEMPLATES: Mapping[str, str] = {
    "qwen2.5": _chatml(
        'For each call return <tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>',
        _CALLS + '{{ "\\n" }}<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
        "{{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}",
    ),
    "qwen3.5": _chatml(
        "Call so:\n<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call>",
        _CALLS + "{{ '\\n' }}<tool_call>\n<function={{ call.function.name }}>\n"
        + _ARGUMENTS + "<parameter={{ key }}>\n"
        f"{_VALUE}\n</parameter>\n{{% endfor %}}</function>\n</tool_call>{{% endfor %}}",
    ),
    "glm4.5": _roles(
        "[gMASK]<sop>{% if tools %}<|system|>\nCall: <tool_call>name\n<arg_key>key</arg_key>\n<arg_value>value"
        "</arg_value>\n</tool_call>{{ tools | tojson }}{% endif %}",
        _THOUGHT.replace("<think>", "\n<think>").replace("}</think>", "}</think>\n") + _SAID,
        _CALLS + "{{ '\\n' }}<tool_call>{{ call.function.name }}\n" + _ARGUMENTS
        + "<arg_key>{{ key }}</arg_key>\n<arg_value>"
        f"{_VALUE}</arg_value>\n{{% endfor %}}</tool_call>{{% endfor %}}",
        "<|ROLE|>",
        "",
    ),
    "minimax-m2": _roles(
        "{% if tools %}]~b]system\n<tools>{{ tools | tojson }}</tools>\n"
        "<minimax:tool_call>\n<invoke name=...>{% endif %}",
        _THOUGHT.replace("</think>", "\n</think>\n\n").replace("<think>", "<think>\n") + _SAID,
        "{% if message.tool_calls %}{{ '\\n' }}<minimax:tool_call>\n" + _CALLS
        + '<invoke name="{{ call.function.name }}">\n'
        + _ARGUMENTS + f'<parameter name="{{{{ key }}}}">{_VALUE}</parameter>\n{{% endfor %}}</invoke>\n{{% endfor %}}'
        "</minimax:tool_call>{% endif %}",
        "]~b]ROLE\n",
        "[e~[\n",
    ),
    "gemma4": _roles(
        "{% macro lax(value) %}{% if value is string %}<|\"|>{{ value }}<|\"|>{% elif value is mapping %}{{ '{' }}"
        "{% for key, each in value.items() %}{{ key }}:{{ lax(each) }}{% if not loop.last %},{% endif %}"
        "{% endfor %}{{ '}' }}"
        "{% elif value is sequence %}[{% for each in value %}{{ lax(each) }}{% if not loop.last %},{% endif %}"
        "{% endfor %}]{% else %}{{ value | tojson }}{% endif %}{% endmacro %}"
        "{% if tools %}<|turn>system\n{{ tools | tojson }}<turn|>\n{% endif %}",
        "{% if message.reasoning_content %}<|channel>thought\n{{ message.reasoning_content }}\n<channel|>{% endif %}"
        + _SAID,
        _CALLS + "<|tool_call>call:{{ call.function.name }}{{ lax(call.function.arguments) }}<tool_call|>{% endfor %}",
        "<|turn>ROLE\n",
        "<turn|>\n",
    ),
    "gpt-oss": "{% if tools %}<|start|>developer<|message|># Tools\nnamespace functions {{ tools | tojson }}<|end|>"
    "{% endif %}" + _LOOP + "{% if message.role == 'assistant' %}"
    "{% if message.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif %}"
    "{% if message.content or not message.tool_calls %}<|start|>assistant"
    "<|channel|>{{ 'commentary' if message.tool_calls else 'final' }}<|message|>"
    "{{ message.content }}<|end|>{% endif %}"
    + _CALLS + "<|start|>assistant to=functions.{{ call.function.name }}<|channel|>commentary json<|message|>"
    "{{ call.function.arguments | tojson }}<|call|>{% endfor %}{% elif message.role == 'tool' %}"
    "<|start|>functions.{{ message.name }} to=assistant<|channel|>commentary<|message|>{{ message.content }}<|end|>"
    "{% else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}" + _END
    + "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "deepseek-v3": _roles(
        _TOOLS,
        _THOUGHT + _SAID,
        "{% if message.tool_calls %}<\uff5ctool▁calls▁begin\uff5c>" + _CALLS
        + "{% if not loop.first %}\n{% endif %}"
        "<\uff5ctool▁call▁begin\uff5c>function<\uff5ctool▁sep\uff5c>{{ call.function.name }}\n```json\n"
        "{{ call.function.arguments | tojson }}\n```<\uff5ctool▁call▁end\uff5c>{% endfor %}"
        "<\uff5ctool▁calls▁end\uff5c>{% endif %}",
        "<\uff5cROLE\uff5c>",
        "",
    ),
    "deepseek-v3.1": _roles(
        _TOOLS,
        _THOUGHT + _SAID,
        "{% if message.tool_calls %}<\uff5ctool▁calls▁begin\uff5c>" + _CALLS
        + "<\uff5ctool▁call▁begin\uff5c>"
        "{{ call.function.name }}"
        "<\uff5ctool▁sep\uff5c>{{ call.function.arguments | tojson }}<\uff5ctool▁call▁end\uff5c>{% endfor %}"
        "<\uff5ctool▁calls▁end\uff5c>{% endif %}",
        "<\uff5cROLE\uff5c>",
        "",
    ),
    "kimi-k2": _roles(
        "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}",
        _THOUGHT + _SAID,
        "{% if message.tool_calls %}<|tool_calls_section_begin|>" + _CALLS + "<|tool_call_begin|>functions."
        "{{ call.function.name }}:{{ loop.index0 }}<|tool_call_argument_begin|>{{ call.function.arguments | tojson }}"
        "<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}",
        "<|im_ROLE|>ROLE<|im_middle|>",
        "<|im_end|>",
    ),
    "command-a": _roles(
        _TOOLS,
        "{% if message.reasoning_content %}<|START_THINKING|>{{ message.reasoning_content }}<|END_THINKING|>{% endif %}"
        + _SAID,
        "{% if message.tool_calls %}<|START_ACTION|>[{{ '\\n' }}" + _CALLS
        + '    {"tool_call_id": "{{ loop.index0 }}", '
        '"tool_name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}'
        "{% if not loop.last %},{% endif %}{{ '\\n' }}{% endfor %}]<|END_ACTION|>{% endif %}",
        "<|START_OF_TURN_TOKEN|><|ROLE|>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "granite3": _roles(
        _TOOLS,
        _SAID,
        "{% if message.tool_calls %}<|tool_call|>[" + _CALLS + '{"name": "{{ call.function.name }}", "arguments": '
        "{{ call.function.arguments | tojson }}}{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}",
        "<|start_of_role|>ROLE<|end_of_role|>",
        "<|end_of_text|>\n",
    ),
    "phi4-mini": _LOOP + "<|{{ message.role }}|>{{ message.content }}{% if message.role == 'system' and "
    "message['tools'] %}<|tool|>{{ message['tools'] }}<|/tool|>{% endif %}<|end|>" + _END
    + "{% if add_generation_prompt %}<|assistant|>{% endif %}{# <|tool_call|> <|/tool_call|> #}",
    "llama3": _roles(
        '{% if tools %}Respond in the format {"name": function name, "parameters": its arguments}.'
        "<|python_tag|>{{ tools | tojson }}{% endif %}",
        _SAID,
        _CALLS + '{% if not loop.first %}; {% endif %}{"name": "{{ call.function.name }}", "parameters": '
        "{{ call.function.arguments | tojson }}}{% endfor %}",
        "<|start_header_id|>ROLE<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "llama4": _roles(
        "{% if tools %}Answer with [func_name1(params_name1=params_value1), func_name2(params)].{{ tools | tojson }}"
        "{% endif %}",
        _SAID,
        "{% if message.tool_calls %}[" + _CALLS + "{{ call.function.name }}(" + _ARGUMENTS + "{{ key }}="
        "{{ value | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}"
        "{% endfor %}]{% endif %}",
        "<|header_start|>ROLE<|header_end|>\n\n",
        "<|eot|>",
    ),
    "lfm2": _chatml(
        "Call within <|tool_call_start|> and <|tool_call_end|>",
        "{% if message.tool_calls %}<|tool_call_start|>[" + _CALLS + "{{ call.function.name }}(" + _ARGUMENTS
        + "{{ key }}={{ value | tojson }}{% if not loop.last %}, {% endif %}{% endfor %})"
        "{% if not loop.last %}, {% endif %}{% endfor %}]<|tool_call_end|>{% endif %}",
    ),
    "mistral-small": _roles(
        "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}",
        "{% if message.reasoning_content %}[THINK]{{ message.reasoning_content }}[/THINK]{% endif %}" + _SAID,
        _CALLS + "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}",
        "[ROLE]",
        "</s>",
    ),
    "plain": CHATML.replace("{{ bos_token }}", ""),
    "mistral-7b": _roles(
        "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}",
        _SAID,
        "{% if message.tool_calls %}[TOOL_CALLS][" + _CALLS + '{"name": "{{ call.function.name }}", "arguments": '
        "{{ call.function.arguments | tojson }}}{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}",
        "[ROLE]",
        "</s>",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family: its template, the form it is known by, what it thinks within, what it cannot write."""

    name: str
    form: ToolFormat
    reasoning: ReasoningTags | None = None
    history: bool = True  # its template writes past calls
    content_with_calls: bool = True

    @property
    def template(self) -> str:
        """Its chat template."""
        return TEMPLATES[self.name]

    @property
    def harmony(self) -> bool:
        """Whether it is gpt-oss's."""
        return self.form is formats.HARMONY


_THINK = ReasoningTags("<think>", "</think>")
FAMILIES = [
    Family("qwen2.5", formats.HERMES, _THINK),
    Family("qwen3.5", formats.QWEN_XML, _THINK),
    Family("glm4.5", formats.GLM, _THINK),
    Family("minimax-m2", formats.MINIMAX, _THINK),
    Family("gemma4", formats.GEMMA, ReasoningTags("<|channel>thought\n", "<channel|>")),
    Family("gpt-oss", formats.HARMONY),
    Family("deepseek-v3", formats.DEEPSEEK_V3, _THINK),
    Family("deepseek-v3.1", formats.DEEPSEEK, _THINK),
    Family("kimi-k2", formats.KIMI, _THINK),
    Family("command-a", formats.COHERE, ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>")),
    Family("granite3", formats.GRANITE),
    Family("phi4-mini", formats.BARRED, history=False),
    Family("llama3", formats.LLAMA, content_with_calls=False),
    Family("llama4", formats.PYTHON, content_with_calls=False),
    Family("lfm2", formats.LFM, _THINK),
    Family("mistral-small", formats.MISTRAL_ARGS, ReasoningTags("[THINK]", "[/THINK]")),
    Family("mistral-7b", formats.MISTRAL),
]
PLAIN = Family("plain", formats.JSON)  # knows no tools: the server tells of them
NAMES = [family.name for family in FAMILIES]


@cache
def _compiled(template: str) -> Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template)


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """A template as transformers renders it."""
    return _compiled(template).render(messages=messages, **variables)


def written(
    family: Family, content: str = "", calls: list[tuple[str, dict[str, Any]]] | None = None, thought: str = ""
) -> str:
    """What a model of the family answers, by its template: its message after the prompt, end marks aside."""
    asked = [{"role": "user", "content": "so?"}]
    answer: dict[str, Any] = {"role": "assistant", "content": content}
    answer["tool_calls"] = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls or ()]
    if thought:
        answer |= {"reasoning_content": thought, "thinking": thought}
    prompt = render(family.template, asked, add_generation_prompt=True)
    whole = render(family.template, [*asked, answer])
    assert whole.startswith(prompt)
    text = whole[len(prompt) :].rstrip("\n")
    for end in (
        "<|im_end|>",
        "[e~[",
        "<turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eot|>",
        "</s>",
    ):
        text = text.removesuffix(end)
    return text


def marks(family: Family) -> list[str]:
    """What is a special token in the family's vocabularies."""
    found = [*family.form.special_tokens, *(family.reasoning.special_tokens if family.reasoning else ())]
    return list(dict.fromkeys(mark for mark in found if "\n" not in mark))


def build(models_dir: Path, tiny: Callable[[str], str], family: Family) -> str:
    """A tiny model of the family, made once; returns its id."""
    folder = models_dir / "families" / family.name
    if not folder.exists():
        shutil.copytree(models_dir / tiny("llama"), folder)
        begin = "<|begin_of_text|>"
        specials = list(dict.fromkeys([begin, "<|im_start|>", "<|im_end|>", *marks(family)]))

        def start(tokenizer: Any) -> Any:
            mark = [(begin, tokenizer.token_to_id(begin))]
            return processors.TemplateProcessing(single=f"{begin} $A", special_tokens=mark)

        byte_level(folder, specials, start)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        settings["model_max_length"] = _CONTEXT
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": _CONTEXT}))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").write_text(family.template)
    return f"families/{family.name}"
