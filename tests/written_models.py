"""A tiny model whose every answer is written beforehand: which one, the last token of its prompt says.

Its attention and its layers add nothing, so that a token alone decides on the next one: real weights, a real tokenizer
and a real chat template, for tests of what is made of an answer. Any thread may build one.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import tiny_models

# A template that lays tools out, knows of thinking, and ends in what is to be answered.
TEMPLATE = (
    "{% if tools %}<tool_call> {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %} {{ call.function.arguments.city }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}{% if messages[-1].role == 'tool' %}[told]{% elif enable_thinking %}[think]"
    "{% elif tools %}[call]{% else %}[hello]{% endif %}{% endif %}{# </think> #}"
)
ANSWERS = {
    "[hello]": ["Good ", "morning."],
    "[think]": ["<think>", "It is ", "early.", "</think>", "Good morning, then."],
    "[call]": [
        *(
            "Wait. ",
            "<tool_call>",
            '\n{"name": "weather", ',
            '"arguments": {"city"',
            ': "Oslo"}}',
            "\n",
            "</tool_call>",
        ),
        *("<tool_call> ", '\n{"name": "now", ', '"arguments": {}}', "\n ", "</tool_call> "),
    ],
    "[told]": ["Oslo ", "is cold."],
}


def build(
    root: Path, model_id: str, answers: Mapping[str, Sequence[str]], template: str, context: int | None = None
) -> str:
    """Put the model into a models folder, once. `answers` are the pieces of each answer, by the prompt's last token.

    A piece that stands in several answers goes on as in the first; it may be told apart by a space at its end.
    The model is as wide as its answers need, and reads `context` tokens.
    """
    folder = root / model_id
    if folder.exists():
        return model_id
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = root / tiny_models.build(root, "llama")
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = AutoConfig.from_pretrained(source)
    config.max_position_embeddings = context or config.max_position_embeddings
    config.hidden_size = max(config.hidden_size, 32 * (sum(map(len, answers.values())) // 32 + 2))
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig.from_pretrained(source)
    chains = [[begin, *pieces] for begin, pieces in answers.items()]
    tokenizer.add_tokens(list(dict.fromkeys(piece for chain in chains for piece in chain)))
    ids = [[*tokenizer.convert_tokens_to_ids(chain), tokenizer.eos_token_id] for chain in chains]
    following: dict[int, int] = {}
    for chain in ids:
        for token, after in itertools.pairwise(chain):
            following.setdefault(token, after)
    model.resize_token_embeddings(len(tokenizer))
    width = model.config.hidden_size
    assert len(following) < width, "the answers have more pieces than the model is wide"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        for place, (token, after) in enumerate(following.items()):
            model.model.embed_tokens.weight[token, place] = 1.0
            model.lm_head.weight[after, place] = 10.0
    scratch = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    (scratch / "chat_template.jinja").write_text(template)
    settings = json.loads((scratch / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (scratch / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.move(scratch, folder)
    return model_id
