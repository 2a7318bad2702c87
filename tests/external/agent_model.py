"""The model that the programs talk to: tiny and real, with prewritten answers that make an agent's loop run to its end.

Asked with tools, it calls the first one that it has arguments for; told a result, it answers in words, as JSON where
the user asks for JSON, or by the tool that an agent framework ends with. It knows no program and no server.
"""

from __future__ import annotations

import json
from pathlib import Path

import written_models

MODEL_ID = "tiny/agent"
CONTEXT = 200_000

GREETING = "Good morning."
TOLD = "Oslo is cold."
REPORT = {"city": "Oslo", "cold": True}

# The arguments of its calls, by the tool's name.
CALLS: dict[str, object] = {
    "weather": {"city": "Oslo"},
    "get_weather": {"city": "Oslo"},
    "Weather-get": {"city": "Oslo"},
    "transfer_to_weather_agent": {},
    "exec_command": {"cmd": "cat notes.txt"},
    "shell": {"command": ["cat", "notes.txt"]},
    "bash": {"command": "cat notes.txt", "description": "Reads the notes"},
    "Bash": {"command": "cat notes.txt"},
    "execute_command": {"command": "cat notes.txt", "requires_approval": False},
    "run_commands": {"commands": ["cat notes.txt"]},
}
# The tools that end an agent's loop: those of pydantic-ai, smolagents, and a class of the name `Report`.
ENDS: dict[str, object] = {
    "final_result": REPORT,
    "final_answer": {"answer": TOLD},
    "Report": REPORT,
    "return_report": REPORT,
    "attempt_completion": {"result": TOLD},
    "submit_and_exit": {"summary": TOLD},
}

# What a text has to hold for an answer of its own: the forms that two frameworks read from plain text.
CODE = "Thought: I know it.\n<code>\nfinal_answer('Oslo is cold.')\n</code>"
MARKED = "[[ ## answer ## ]]\nOslo is cold.\n\n[[ ## completed ## ]]"

_FIRST = "{%- set ns = namespace(chosen='', user='', told=false, all='') -%}"
_READ = (
    "{%- for message in messages -%}{%- set ns.all = ns.all ~ message.content -%}"
    "{%- if message.role == 'user' -%}{%- set ns.user = ns.user ~ message.content -%}"
    "{%- elif message.role == 'tool' -%}{%- set ns.told = true -%}{%- endif -%}{%- endfor -%}"
)
_SHOW = (
    "{% if tools %}<tool_call> {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %} {{ call.function.name }}{% endfor %}\n{% endfor %}"
)


def _template() -> str:
    """The chat template: it ends in the token that the answer follows from."""
    calls, ends = json.dumps(list(CALLS)), json.dumps(list(ENDS))
    pick = (
        "{%- for name in wanted -%}{%- for tool in tools or [] -%}"
        "{%- if not ns.chosen and tool.function.name == name -%}{%- set ns.chosen = '[call ' ~ name ~ ']' -%}"
        "{%- endif -%}{%- endfor -%}{%- endfor -%}"
    )
    choose = (
        f"{{%- if add_generation_prompt -%}}"
        f"{{%- set wanted = {ends} if ns.told else {calls} + {ends} -%}}{pick}"
        "{%- if not ns.chosen -%}"
        "{%- if '[[ ## answer ## ]]' in ns.all -%}{%- set ns.chosen = '[marked]' -%}"
        "{%- elif '<code>' in ns.all -%}{%- set ns.chosen = '[code]' -%}"
        "{%- elif 'JSON' in ns.user -%}{%- set ns.chosen = '[json]' -%}"
        "{%- elif ns.told -%}{%- set ns.chosen = '[told]' -%}"
        "{%- else -%}{%- set ns.chosen = '[hello]' -%}{%- endif -%}{%- endif -%}{{ ns.chosen }}{%- endif -%}"
    )
    return _FIRST + _READ + _SHOW + choose


def _call(name: str, arguments: object) -> list[str]:
    """The pieces of a call. A grammar forces all until the first value: to there it is one piece."""
    text = f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n'
    begun = text.find(": ", text.index('"arguments": ') + len('"arguments": ')) + 2
    begun = begun if begun > 1 else text.index('"arguments": ')
    return [text[:begun], text[begun:], "</tool_call>"]


def build(root: Path) -> str:
    """Put the model into a models folder, once, and return its id."""
    answers: dict[str, list[str]] = {
        "[hello]": ["Good ", "morning."],
        "[told]": ["Oslo ", "is cold."],
        "[json]": ['{"city": ', '"Oslo", ', '"cold": ', "true}"],  # a form leaves no choice in what is forced
        "[code]": [CODE[:20], CODE[20:]],
        "[marked]": [MARKED[:20], MARKED[20:]],
    }
    answers |= {f"[call {name}]": _call(name, arguments) for name, arguments in (CALLS | ENDS).items()}
    return written_models.build(root, MODEL_ID, answers, _template(), CONTEXT)
