"""Derives a model's head, tasks and sizes from its config, its tokenizer's config and the headers of its files.

The rules match those by which a loaded model finds its tasks, but read a config instead of a model. Pure functions; any
thread may call them. Must not know where files come from.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from ..modeling import rotary
from ..tasks import MODEL_TYPES, TASKS, Head, canonical_task, supported_tasks
from .headers import SAFETENSORS_TYPES, Tensor
from .names import Names

# Kinds of encoder-decoder that make the decoder's input from the encoder's, so that they run on a text alone.
_RUNS_ON_TEXT = frozenset({"bart", "bigbird_pegasus", "fsmt", "led", "mbart", "mvp", "plbart"})
# Kinds without a base model under the head, so that they give no hidden states.
_NO_BASE = frozenset({"llama4", "llama4_text", "mllama"})
# Kinds whose positions start after the padding token's id: the entries of the table up to it are not used.
_AFTER_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "lxmert",
        "markuplm",
        "mpnet",
        "prophetnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
_TRANSLATORS = frozenset(
    {"fsmt", "m2m_100", "marian", "mbart", "nllb-moe", "seamless_m4t", "seamless_m4t_v2", "xlm-prophetnet"}
)
_SUMMARIZERS = frozenset({"bigbird_pegasus", "pegasus", "pegasus_x"})
_TALKERS = frozenset({"blenderbot", "blenderbot-small"})
_SAYS_SUMMARY = re.compile(r"summar|[-_](cnn|xsum|samsum|cnn_dailymail|dialogsum)\b", re.IGNORECASE)
_SAYS_TRANSLATION = re.compile(r"translat|opus-mt|nllb|m2m100|many-to-many|[-_][a-z]{2}-to-[a-z]{2}\b", re.IGNORECASE)

# Tensors of a checkpoint that are not parameters: computed tables, masks, and scales of packed weights.
_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|final_logits_bias|masked_bias|inv_freq|num_batches_tracked"
    r"|qzeros|g_idx|weight_scale(_inv|_2)?|input_scale|weight_zero_point|weight_shape|weight_g_idx"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)|SCB|weight_format|.*_scales)$"
)


# Head and tasks -------------------------------------------------------------------------------------------------------


def head_of(names: Names, config: Mapping[str, Any], wanted: tuple[Head, ...] | None = None) -> Head | None:
    """The head that the weights have, by `Heads.pick`."""
    remote = config.get("auto_map")
    return names.heads.pick(
        text(config.get("model_type")),
        strings(config.get("architectures")),
        wanted,
        remote=remote if isinstance(remote, dict) else (),
        encoder_decoder=is_encoder_decoder(names, config),
    )


def no_text(names: Names, config: Mapping[str, Any], head: Head | None) -> str | None:
    """The architecture with the reason why it cannot run on a text alone, by `Heads.no_text`; None where it can."""
    if head is None:
        return None
    kind = text(config.get("model_type"))
    return names.heads.no_text(head, kind, strings(config.get("architectures")), partial(names.inputs, kind))


def is_encoder_decoder(names: Names, config: Mapping[str, Any]) -> bool:
    """Whether the model has an encoder and a decoder."""
    default = names.config_defaults(text(config.get("model_type"))).get("is_encoder_decoder", False)
    return bool(config.get("is_encoder_decoder", default))


def tasks_of(names: Names, config: Mapping[str, Any], head: Head, tokenizer: Mapping[str, Any]) -> list[str]:
    """The tasks of `TASKS` that a model with this head can do, in that table's order."""
    kind = text(config.get("model_type"))
    able = {canonical_task(name) for name in supported_tasks(head)}
    mask = has_mask(tokenizer)
    if head == "seq2seq-lm":
        if mask and names.heads.every("masked-lm") & set(strings(config.get("architectures"))):
            able.add("fill-mask")
        if kind in _RUNS_ON_TEXT:
            able.add("feature-extraction")
    elif not mask:
        able.discard("fill-mask")
    # T5 and its relatives: the encoder's weights alone can run on a text, the whole model cannot.
    whole = not any(name.endswith("EncoderModel") for name in strings(config.get("architectures")))
    if head == "base" and whole and is_encoder_decoder(names, config) and kind not in _RUNS_ON_TEXT:
        able.discard("feature-extraction")
    if head != "base" and kind in _NO_BASE:
        able.discard("feature-extraction")
    return [name for name in TASKS if name in able]


def has_mask(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the tokenizer has a mask token: its config says so, or its class is a specific one, which mostly has."""
    if "mask_token" in tokenizer:
        return tokenizer["mask_token"] is not None
    kind = text(tokenizer.get("tokenizer_class"))
    return kind not in ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")


def model_type_of(
    model_id: str, config: Mapping[str, Any], head: Head | None, *, chat: bool, embedding: bool
) -> str | None:
    """The type of record that fits the model best, a name of `MODEL_TYPES`."""
    found = _model_type(model_id, config, head, chat, embedding)
    return found if found in MODEL_TYPES else None


def _model_type(model_id: str, config: Mapping[str, Any], head: Head | None, chat: bool, embedding: bool) -> str | None:
    asked = config.get("task_specific_params")
    asked = set(asked) if isinstance(asked, dict) else set()
    if head is None:
        return None
    if embedding:
        return "feature-extraction"
    if head == "causal-lm":
        return "conversational" if chat or "conversational" in asked else "text-generation"
    if head == "seq2seq-lm":
        return _seq2seq_type(model_id, text(config.get("model_type")), asked)
    if head == "sequence-classification":
        labels = [text(label).lower() for label in _labels(config)]
        if any(label.startswith("entail") for label in labels):
            return "zero-shot-classification"
        return "text-classification" if len(labels) == 1 else "sentiment-analysis"
    plain: Mapping[Head, str] = {
        "masked-lm": "fill-mask",
        "token-classification": "token-classification",
        "question-answering": "question-answering",
        "table-question-answering": "table-question-answering",
        "base": "feature-extraction",
    }
    return plain[head]


def _seq2seq_type(model_id: str, kind: str, asked: set[str]) -> str:
    if kind in _TALKERS:
        return "conversational"
    if kind in _SUMMARIZERS or _SAYS_SUMMARY.search(model_id):
        return "summarization"
    translates = {name for name in asked if name.startswith("translation")}
    if _SAYS_TRANSLATION.search(model_id) or (asked and asked == translates):
        return "translation"
    # T5's config names several tasks, those of fine-tuned BART models only one.
    if "summarization" in asked and not translates:
        return "summarization"
    return "translation" if kind in _TRANSLATORS else "text2text-generation"


def _labels(config: Mapping[str, Any]) -> list[Any]:
    labels = config.get("id2label")
    if isinstance(labels, dict):
        return list(labels.values())
    count = config.get("num_labels")
    return [""] * (count if isinstance(count, int) and 0 < count < 10_000 else 2)


# Context and sizes ----------------------------------------------------------------------------------------------------


def context_of(names: Names, config: Mapping[str, Any]) -> int | None:
    """The most tokens that the model can read, by its config; None where the config does not say."""
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    kind = text(config.get("model_type"))
    defaults = names.config_defaults(kind)
    others = defaults.get("attribute_map")
    name = "max_position_embeddings"
    name = others.get(name, name) if isinstance(others, dict) else name
    said = config.get(name, config.get("max_position_embeddings", defaults.get(name)))
    if said is None:
        name = "max_encoder_position_embeddings"
        said = config.get(name, defaults.get(name))
    if not isinstance(said, int) or isinstance(said, bool) or said <= 0:
        return None
    if kind in _AFTER_PADDING:
        padding = config.get("pad_token_id", defaults.get("pad_token_id"))
        said -= (1 if kind == "mpnet" else padding if isinstance(padding, int) else 0) + 1
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(scaling, dict) and isinstance(defaults.get("default_theta"), dict):  # one for each kind of layer
        scaling = scaling if "full_attention" in scaling else {"full_attention": scaling}
    return rotary.context(said, scaling) if said > 0 else None


def quantization_of(config: Mapping[str, Any]) -> tuple[str | None, int]:
    """The quantization in which the weights are published, and the bits of one weight; (None, 0) for none."""
    settings = config.get("quantization_config", config.get("compression_config"))
    if not isinstance(settings, dict):
        return None, 0
    method = settings.get("quant_method")
    if not isinstance(method, str):
        bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
        method = "bitsandbytes" if bitsandbytes else "unknown"
    bits = next((settings[name] for name in ("bits", "w_bit", "nbits") if isinstance(settings.get(name), int)), 0)
    if method == "bitsandbytes" and not bits:
        bits = 8 if settings.get("load_in_8bit") else 4
    return method, bits or 4


def count_parameters(tensors: Mapping[str, Tensor], quantization: str | None, bits: int) -> int:
    """The number of parameters; packed weights count as the values that they hold."""
    total = 0
    for name, tensor in tensors.items():
        computed = name.endswith((".attn.bias", ".attention.bias")) and len(tensor.shape) == 4  # GPT-2's causal mask
        if computed or _BUFFERS.search(name) or (quantization in ("gptq", "awq") and name.endswith(".scales")):
            continue
        packed = 1
        if name.endswith((".qweight", ".weight_packed")) and tensor.type in ("I32", "U32"):
            packed = max(1, 32 // bits)
        elif tensor.type == "U8" and (
            name.endswith("_blocks") or (quantization == "bitsandbytes" and bits == 4 and name.endswith(".weight"))
        ):
            packed = 2
        total += tensor.count * packed
    return total


def bytes_by_type(tensors: Iterable[Tensor]) -> dict[str, int]:
    """The tensors' bytes by type, the largest first; types have torch's names, or GGUF's."""
    found: dict[str, int] = {}
    for tensor in tensors:
        name = SAFETENSORS_TYPES.get(tensor.type, (tensor.type, 0))[0]
        found[name] = found.get(name, 0) + (tensor.bytes or 0)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def bytes_of_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """The bytes by type, as `bytes_by_type`, from the number of values of each type."""
    known = {
        SAFETENSORS_TYPES[kind][0]: count * SAFETENSORS_TYPES[kind][1] // 8
        for kind, count in counts.items()
        if kind in SAFETENSORS_TYPES
    }
    return dict(sorted(known.items(), key=lambda item: -item[1]))


# Chats ----------------------------------------------------------------------------------------------------------------


def templates_of(tokenizer: Mapping[str, Any], files: Collection[str]) -> list[str]:
    """The chat templates: the given texts of files, and those in the tokenizer's config."""
    return [*files, *_template_texts(tokenizer.get("chat_template"))]


def _template_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _template_texts(each.get("template") if isinstance(each, dict) else each)


def mentions_tools(templates: Iterable[str]) -> bool:
    """Whether any of the templates uses tools."""
    return any(re.search(r"\btools\b", template) for template in templates)


# Words of a config ----------------------------------------------------------------------------------------------------


def text(value: Any) -> str:
    """Returns a string as it is, and an empty string for any other value."""
    return value if isinstance(value, str) else ""


def strings(value: Any) -> list[str]:
    """The strings in a list; empty if the value is not a list."""
    return [each for each in value if isinstance(each, str)] if isinstance(value, list | tuple) else []
