"""Checks the shape of each task's `inputs` before its pipeline sees them.

Pure functions of JSON values, for any thread. Each returns a value that the pipeline may keep or change, or raises an
`InvalidRequest` that names the part at fault. Must not know models or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InvalidRequest


def refuse(field: str, reason: str) -> InvalidRequest:
    """The error for a field whose value is unusable; `reason` follows the field's name."""
    return InvalidRequest(f"Invalid value for field '{field}': {reason}", field)


def text(value: Any, field: str, *, empty: bool = True) -> str:
    """Returns `value` if it is text with a UTF-8 form, which a tokenizer can read."""
    if not isinstance(value, str):
        raise refuse(field, "must be text")
    if not empty and not value:
        raise refuse(field, "must not be empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refuse(field, "must be valid Unicode text") from None
    return value


def _items(value: list[Any], field: str, check: Callable[[Any, str], Any]) -> list[Any]:
    if not value:
        raise refuse(field, "must not be empty")
    return [check(item, f"{field}.{index}") for index, item in enumerate(value)]


def texts(value: Any) -> str | list[str]:
    """Checks one text, or a list of texts."""
    if isinstance(value, list):
        return _items(value, "inputs", text)
    if not isinstance(value, str):
        raise refuse("inputs", "must be text or a list of texts")
    return text(value, "inputs")


def nonempty_texts(value: Any) -> str | list[str]:
    """Checks one text, or a list of texts, none of them empty."""
    if isinstance(value, list):
        return _items(value, "inputs", lambda item, field: text(item, field, empty=False))
    if not isinstance(value, str):
        raise refuse("inputs", "must be text or a list of texts")
    return text(value, "inputs", empty=False)


def texts_or_pairs(value: Any) -> Any:
    """Checks one text or one pair `{"text", "text_pair"}`, or a list of either."""
    return _items(value, "inputs", _text_or_pair) if isinstance(value, list) else _text_or_pair(value, "inputs")


def _text_or_pair(value: Any, field: str) -> Any:
    if not isinstance(value, dict):
        if not isinstance(value, str):
            raise refuse(field, 'must be text, or a pair of texts as {"text": ..., "text_pair": ...}')
        return text(value, field)
    for key in value:
        if key not in ("text", "text_pair"):
            raise refuse(f"{field}.{key}", "is not one of 'text' and 'text_pair'")
    if "text" not in value:
        raise refuse(field, "must have a 'text'")
    return {key: text(part, f"{field}.{key}") for key, part in value.items()}


def words(value: Any) -> list[Any]:
    """Checks one text as a list of its words, or a list of such lists."""
    if not isinstance(value, list):
        raise refuse("inputs", "must be a list of words, or a list of such lists, where is_split_into_words is true")
    if value and all(isinstance(item, list) for item in value):
        return _items(value, "inputs", lambda item, field: _items(item, field, text))
    return _items(value, "inputs", text)


def prompts_or_chats(value: Any) -> Any:
    """Checks one prompt or chat, or a list of prompts or of chats; a chat is a list of messages."""
    if not isinstance(value, list):
        if not isinstance(value, str):
            raise refuse("inputs", "must be text, a chat, or a list of either")
        return text(value, "inputs")
    if not value:
        raise refuse("inputs", "must not be empty")
    if isinstance(value[0], dict):
        return _items(value, "inputs", _message)
    if isinstance(value[0], list):
        return _items(value, "inputs", _chat)
    return _items(value, "inputs", text)


def is_chat(value: Any) -> bool:
    """Whether checked prompts or chats are chats."""
    return isinstance(value, list) and not isinstance(value[0], str)


def _chat(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise refuse(field, "must be a chat like the others: a list of messages")
    return _items(value, field, _message)


def _message(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refuse(field, 'must be a message: {"role": ..., "content": ...}')
    for key in ("role", "content"):
        if key not in value:
            raise refuse(field, f"must have a '{key}'")
    text(value["role"], f"{field}.role", empty=False)
    text(value["content"], f"{field}.content")
    return dict(value)


def tables(value: Any) -> Any:
    """Checks one question `{"table", "query"}`, or a list of them; a query is one text or several, a table columns or
    rows."""
    return _items(value, "inputs", _question) if isinstance(value, list) else _question(value, "inputs")


def _question(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refuse(field, 'must be {"table": ..., "query": ...}')
    for key in ("table", "query"):
        if key not in value:
            raise refuse(field, f"must have a '{key}'")
    for key in value:
        if key not in ("table", "query"):
            raise refuse(f"{field}.{key}", "is not one of 'table' and 'query'")
    query = value["query"]
    if isinstance(query, list):
        query = _items(query, f"{field}.query", lambda item, name: text(item, name, empty=False))
    else:
        text(query, f"{field}.query", empty=False)
    return {"table": _table(value["table"], f"{field}.table"), "query": query}


def _table(value: Any, field: str) -> dict[str, list[str]]:
    """Returns a table as columns of equal length; takes columns, or rows that all have the same columns."""
    if isinstance(value, list):
        rows = _items(value, field, _row)
        for index, row in enumerate(rows):
            if row.keys() != rows[0].keys():
                raise refuse(f"{field}.{index}", "must have the same columns as the first row")
        return {column: [row[column] for row in rows] for column in rows[0]}
    if not isinstance(value, dict):
        raise refuse(field, "must be an object of columns, or a list of rows")
    columns = {name: _column(cells, f"{field}.{name}") for name, cells in value.items()}
    lengths = {len(cells) for cells in columns.values()}
    if not columns or lengths == {0}:
        raise refuse(field, "must not be empty")
    if len(lengths) > 1:
        raise refuse(field, "must have columns of equal length")
    return columns


def _row(value: Any, field: str) -> Mapping[str, str]:
    if not isinstance(value, dict) or not value:
        raise refuse(field, "must be a row: an object with a text for each column")
    return {name: text(cell, f"{field}.{name}") for name, cell in value.items()}


def _column(value: Any, field: str) -> list[str]:
    if not isinstance(value, list):
        raise refuse(field, "must be a list of cells")
    # Numbers are refused too: a table model reads text, and "1" and "1.0" are different cells to it.
    return [text(cell, f"{field}.{index}") for index, cell in enumerate(value)]
