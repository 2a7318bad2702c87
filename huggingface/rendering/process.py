"""The process that renders chats: `rendering` runs this file as a program, with transformers and without torch.

A chat template is a program of a model's author. It runs here under limits, so that an endless template, or one that
makes gigabytes, fails only its own request. A question is pickled on the standard input: the template's text, its
values, and its seconds of CPU time. An answer is a JSON object on the standard output. Each message begins with its
length in 8 bytes. An empty object says that the imports are done.
"""

from __future__ import annotations

import json
import pickle
import signal
import struct
import sys
from typing import IO, Any

LENGTH = struct.Struct("<Q")
MAX_CHARACTERS = 16 << 20  # of one rendered chat
MAX_BYTES = 512 << 20  # of memory, on top of the process's own at its start


def main() -> None:
    """Answers questions until the input ends."""
    sys.modules.update({"torch": None})  # type: ignore[dict-item]  # it takes seconds, and no template needs it
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    from transformers.utils import chat_template_utils

    _limit_memory()
    _write(answers, {})
    while (question := read(sys.stdin.buffer)) is not None:
        template, values, seconds = pickle.loads(question)  # noqa: S301 - from the server itself
        _limit_time(seconds)
        answer = _render(chat_template_utils, template, values)
        _limit_time(0)
        _write(answers, answer)


def _limit_time(seconds: int) -> None:
    """Ends the process by a signal after so many seconds of CPU time, even in a loop in C; 0 for no limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _write(stream: IO[bytes], answer: dict[str, str]) -> None:
    message = json.dumps(answer).encode()
    stream.write(LENGTH.pack(len(message)) + message)
    stream.flush()


def read(stream: IO[bytes]) -> bytes | None:
    """Reads the next message of a stream; None at its end."""
    start = stream.read(LENGTH.size)
    if len(start) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(start)
    message = stream.read(length)
    return message if len(message) == length else None


def _render(library: Any, template: str, values: dict[str, Any]) -> dict[str, str]:
    """Renders the text; returns it, or the error's kind and message."""
    from jinja2 import TemplateError

    try:
        text = library._compile_jinja_template(template).render(**values)
    except MemoryError:
        return {"error": "TooLarge", "message": "it takes too much memory"}
    except RecursionError:
        return {
            "error": "RecursionError",
            "message": "it calls itself without an end, or the chat is nested too deeply",
        }
    except Exception as error:  # noqa: BLE001 - the caller gets any error of a template
        kind = "TemplateError" if isinstance(error, TemplateError) else type(error).__name__
        return {"error": kind, "message": str(error)[:2000]}
    if len(text) > MAX_CHARACTERS:
        return {"error": "TooLarge", "message": f"it makes more than {MAX_CHARACTERS >> 20} million characters"}
    return {"text": text}


def _limit_memory() -> None:
    """Limits memory, so that a larger allocation raises MemoryError, where the system supports that."""
    try:
        import resource
        from pathlib import Path

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        maximum = pages * resource.getpagesize() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (maximum, maximum))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    main()
