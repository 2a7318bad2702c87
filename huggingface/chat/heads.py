"""Reads the head of a call: the name and the marks around it, before the arguments.

Pure functions; any thread.
"""

from __future__ import annotations

import re

from .formats import ToolFormat

_SPACE = " \t\r\n"
_NAME = re.compile(r"[\w.:/-]{0,192}")

# The head of Mistral's newer calls, up to the arguments, and the beginning of one.
_MISTRAL = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][\s\w-]*)?(?:\[ARGS\]\s*)?(?={)")
_MISTRAL_PART = re.compile(r"\s*[\w.-]*\s*(?:\[[A-Z_]*(?:\][\s\w-]*(?:\[[A-Z]*\]?\s*)?)?)?")


def match_head(form: ToolFormat, text: str) -> tuple[str, int]:
    """The name in the head of a call at the start of `text`, and the index where the head ends: 0 if there is no head,
    negative if more text may complete it."""
    if form.name == "mistral":
        head = _MISTRAL.match(text)
        return (head[1], head.end()) if head else ("", -1 if _MISTRAL_PART.fullmatch(text) else 0)
    before, _, after = form.call.partition("$arguments")[0].partition("$name")
    numbered = after.startswith(":$index")
    at = 0
    for piece in (before, None, after.removeprefix(":$index")):
        if piece is None:
            named = _NAME.match(text, at)
            name, at = (named[0], named.end()) if named else ("", at)
            if at == len(text):
                return "", -1
            if not name:
                return "", 0
            continue
        wanted = piece.strip()
        if not wanted:
            continue
        at += len(text[at:]) - len(text[at:].lstrip(_SPACE))
        if not text.startswith(wanted, at):
            return "", -1 if wanted.startswith(text[at:]) else 0
        at += len(wanted)
    return (re.sub(r":\d+$", "", name) if numbered else name), at
