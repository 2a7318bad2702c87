"""GGUF files that are split into parts, as llama.cpp's `gguf-split` does: the parts' names, and their headers as one.

Each part is a GGUF file with tensors of its own; the model's keys are in the first, which may have no tensors. Pure
functions; any thread may call them. Must not know paths, the network, or what a model is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .headers import GGUFHeader, Tensor

SUFFIX = ".gguf"
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.gguf)", re.DOTALL | re.IGNORECASE)


class PartsDisagree(ValueError):
    """The keys of a file, or of several, do not fit its name or each other; the message names the file."""


def part_names(name: str) -> list[str]:
    """The names of all parts of the file that `name` is a part of, in order; `name` alone where it is no part."""
    found = _PART.fullmatch(name)
    if found is None or not 1 <= int(found[2]) <= int(found[3]):
        return [name]
    begin, end = name[: found.start(2)], name[found.end(2) :]
    return [f"{begin}{number:05}{end}" for number in range(1, int(found[3]) + 1)]


def whole_name(name: str) -> str:
    """The name of the file that `name` is a part of: `model.gguf` for `model-00002-of-00003.gguf`."""
    found = _PART.fullmatch(name)
    return name if found is None else found[1] + found[4]


def first_names(names: Iterable[str]) -> list[str]:
    """The GGUF files among `names`, sorted; of one in several parts only the first."""
    return sorted(name for name in names if name.lower().endswith(SUFFIX) and part_names(name)[0] == name)


def join(headers: Mapping[str, GGUFHeader]) -> GGUFHeader:
    """One header for all parts, given by their names in order: the first one's keys, and the tensors of all.

    Its `end` is unknown where there are several, and its tensors where those of one part are.

    Raises:
        PartsDisagree: the files are not the parts of one model.
    """
    values = next(iter(headers.values())).values
    if len(headers) == 1:
        [(name, header)] = headers.items()
        if values.get("split.count") not in (None, 0, 1):
            raise PartsDisagree(
                f"{name} is one of several parts by its keys, and not by its name; parts are called "
                "NAME-00001-of-00003.gguf, and so on"
            )
        return header
    tensors: dict[str, Tensor] = {}
    for number, (name, header) in enumerate(headers.items()):
        said = header.values.get("split.no"), header.values.get("split.count")
        if said != (number, len(headers)):
            raise PartsDisagree(f"{name} is part {number + 1} of {len(headers)} by its name, and not by its keys")
        if header.tensors is None:
            return GGUFHeader(values, None, None)
        if tensors.keys() & header.tensors.keys():
            raise PartsDisagree(f"{name} holds tensors that a part before it holds too; it is another model's")
        tensors |= header.tensors
    for name, header in headers.items():
        if header.values.get("split.tensors.count") != len(tensors):
            raise PartsDisagree(
                f"{name} and its other parts hold {len(tensors)} tensors, and not as many as its keys say; they are of "
                "several models"
            )
    return GGUFHeader(values, tensors, None)
