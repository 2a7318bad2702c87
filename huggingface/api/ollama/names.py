"""What Ollama's clients call a model, and which registered one that is: `name:tag`, `hf.co/org/name:quant`.

A tag of `latest` stands for nothing; any other has to be what the model is registered with: the quantization that its
GGUF file is named for, or its revision. Any thread may call this. Must not know HTTP or files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from ...errors import ModelNotFound
from ...registry.records import ModelRecord
from ..requests.services import services

_HOSTS = ("hf.co/", "huggingface.co/")
_LATEST = "latest"


class Name(NamedTuple):
    """A model's id, and the tag behind it; None where there is none that means something."""

    model_id: str
    tag: str | None


def parse(name: str) -> Name:
    """Take apart what a client calls a model."""
    for host in _HOSTS:
        name = name.removeprefix(host)
    model_id, _, tag = name.partition(":")
    return Name(model_id, tag if tag and tag != _LATEST else None)


def find(name: str) -> ModelRecord:
    """The registered model of that name.

    Raises:
        ModelNotFound: there is none, or it is registered with another file or revision than the tag's; says `name`.
    """
    registry = services().registry
    with suppress(ModelNotFound):
        return registry.get(name)
    model_id, tag = parse(name)
    with suppress(ModelNotFound):
        record = registry.get(model_id)
        if tag is None or fits(record, tag):
            return record
    raise ModelNotFound(name)


def fits(record: ModelRecord, tag: str) -> bool:
    """Whether a tag names what a model is registered with."""
    return tag == record.revision or (record.gguf_file is not None and bool(files_of(tag, [record.gguf_file])))


def files_of(quantization: str, names: Iterable[str]) -> list[str]:
    """Those of the GGUF files' names that end in the name of a quantization (`…-Q4_K_M.gguf`)."""
    ending = re.compile(rf"(.*[-./])?{re.escape(quantization)}\.gguf", re.IGNORECASE)
    return [name for name in names if ending.fullmatch(name)]
