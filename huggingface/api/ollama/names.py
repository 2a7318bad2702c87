"""Finds the registered model for a name of Ollama's clients: `name:tag`, `hf.co/org/name:quant`.

The tag `latest` is ignored; any other tag must be the quantization in the name of the model's registered GGUF file, or
its registered revision. Any thread may call this. Must not know HTTP or files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from ...errors import ModelNotFound
from ...inspection.gguf_parts import whole_name
from ...registry.records import ModelRecord
from ..requests.services import services

_HOSTS = ("hf.co/", "huggingface.co/")
_LATEST = "latest"


class Name(NamedTuple):
    """A model's id, and its tag; None without a tag, or for `latest`."""

    model_id: str
    tag: str | None


def parse(name: str) -> Name:
    """Splits a client's name for a model."""
    for host in _HOSTS:
        name = name.removeprefix(host)
    model_id, _, tag = name.partition(":")
    return Name(model_id, tag if tag and tag != _LATEST else None)


def find(name: str) -> ModelRecord:
    """The registered model with this name.

    Raises:
        ModelNotFound: there is none, or it is registered with a file or revision other than the tag's.
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
    """Whether a tag names a model's registered revision or GGUF file."""
    return tag == record.revision or (record.gguf_file is not None and bool(files_of(tag, [record.gguf_file])))


def files_of(quantization: str, names: Iterable[str]) -> list[str]:
    """The GGUF files whose names, without that of a part, end in the name of a quantization (`…-Q4_K_M.gguf`)."""
    ending = re.compile(rf"(.*[-./])?{re.escape(quantization)}\.gguf", re.IGNORECASE)
    return [name for name in names if ending.fullmatch(whole_name(name))]
