"""Chooses the head of a model's weights, both for preflight and for a load.

Works on transformers' own tables of class names: the loader imports them, preflight reads them from the source files
(`names`). Nothing changes after the constructor; any thread may call this. Must not know files, or import transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ..tasks import HEADS, Head

# The class that loads each head.
AUTO_CLASSES: Mapping[Head, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "table-question-answering": "AutoModelForTableQuestionAnswering",
    "base": "AutoModel",
}
# The table that lists each head's architectures.
_OF_HEADS: Mapping[Head, str] = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "table-question-answering": "MODEL_FOR_TABLE_QUESTION_ANSWERING_MAPPING_NAMES",
    "base": "MODEL_MAPPING_NAMES",
}
# Models that read images or audio and write text. For some kinds AutoModelForCausalLM loads only the language model.
_WHOLE = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
TABLES = (*_OF_HEADS.values(), *_WHOLE)

# Kinds that need an image or audio, although their declared inputs look like those of kinds that do not.
_NEVER_ALONE = frozenset({"align", "blip", "bridgetower", "flava", "idefics", "lxmert", "vilt"})
# Inputs other than text.
_FOREIGN = frozenset({"pixel_values", "input_features", "input_values", "visual_feats", "visual_pos"})

Classes = tuple[str, ...]
# The inputs of a model class: its modalities, and the arguments of its `forward` with whether they are required.
Inputs = tuple[str | Sequence[str], Mapping[str, bool]]


class Heads:
    """transformers' tables of heads. A kind is a `model_type` of config.json, an architecture is a class name."""

    def __init__(self, tables: Mapping[str, Any]) -> None:
        """`tables` holds, for each of `TABLES`, a mapping from a kind to one or more class names."""
        self._tables = {name: {kind: _classes(value) for kind, value in tables[name].items()} for name in TABLES}

    def classes(self, head: Head, kind: str) -> Classes:
        """The architectures of a kind with this head."""
        return self._tables[_OF_HEADS[head]].get(kind, ())

    def every(self, head: Head) -> frozenset[str]:
        """The architectures with this head of all kinds."""
        return frozenset(name for classes in self._tables[_OF_HEADS[head]].values() for name in classes)

    def _whole(self, kind: str) -> Classes:
        return tuple(name for table in _WHOLE for name in self._tables[table].get(kind, ()))

    def pick(
        self,
        kind: str,
        architectures: Sequence[str],
        wanted: tuple[Head, ...] | None,
        *,
        remote: Collection[str],
        encoder_decoder: bool,
    ) -> Head | None:
        """The head that the weights have, or None where no head serves a task here.

        Where the weights fit several heads, or the config names no architecture, the first of `wanted` that the kind
        has is chosen; without `wanted`, a config without architectures gives None. `remote` are the auto classes for
        which the folder has its own code.
        """
        if wanted == ("base",) and self.classes("base", kind):  # AutoModel loads any checkpoint without its head
            return "base"
        order = [*(wanted or ()), *(head for head in HEADS if head not in (wanted or ()))]
        for architecture in architectures:
            # BART has one class for filling masks and generating; the tasks of the generating head include both.
            if "masked-lm" in (wanted or ()) and architecture in self.classes("seq2seq-lm", kind):
                return "seq2seq-lm"
            if architecture in self._whole(kind) and self.classes("causal-lm", kind):
                return "causal-lm"
            for head in order:
                if architecture in self.classes(head, kind):
                    return head
            for head in order:
                if AUTO_CLASSES[head] in remote:
                    return head
            # Older names: a pretraining or language-model head has the weights of the present head.
            if architecture.endswith(("ForPreTraining", "LMHeadModel")):
                plain: list[Head] = ["masked-lm", "causal-lm", "seq2seq-lm"]
                if wanted is not None:
                    plain.sort(key=order.index)
                elif architecture.endswith("LMHeadModel"):
                    plain = ["causal-lm", "seq2seq-lm", "masked-lm"]
                for head in plain:
                    if self.classes(head, kind):
                        return head
        if not architectures and wanted is not None:
            generates: tuple[Head, ...] = ("seq2seq-lm",) if encoder_decoder else ()
            return next((head for head in (*wanted, *generates) if self.classes(head, kind)), None)
        return None

    def no_text(
        self, head: Head, kind: str, architectures: Sequence[str], inputs: Callable[[str], Inputs | None]
    ) -> str | None:
        """The architecture with the reason why it cannot run on a text alone ("X, which reads …"); None where it can.

        `inputs` returns the inputs of a class, or None where they are unknown.
        """
        if head in ("causal-lm", "seq2seq-lm"):
            return None
        classes = self.classes(head, kind)
        name = next((each for each in architectures if each in classes), next(iter(classes), ""))
        read = inputs(name)
        writes = bool(self.classes("causal-lm", kind) or self.classes("masked-lm", kind) or self._whole(kind))
        reason = None if read is None else _why_no_text(kind, *read, writes)
        return None if reason is None else f"{[*architectures, name][0]}, which {reason}"


def _classes(value: Any) -> Classes:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _why_no_text(kind: str, modalities: str | Sequence[str], arguments: Mapping[str, bool], writes: bool) -> str | None:
    """The reason why a class cannot run on a text alone, in words after "which"; None where it can.

    `writes` says whether its kind has a language model, which runs on texts alone whatever else it reads.
    """
    read = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    others = " and ".join(each for each in read if each != "text") or "other things"
    alone = writes or kind.endswith(("_text", "_text_model"))
    if "input_ids" not in arguments or not (alone or "text" in read):
        return f"reads {others}, no text"
    if "bbox" in arguments:
        return "reads text with its places on a page"
    if any(arguments.get(name) for name in _FOREIGN) or kind in _NEVER_ALONE:
        return f"reads {others} together with text"
    if not (alone or set(read) == {"text"} or "inputs_embeds" in arguments):
        return f"reads {others} together with text"
    return None
