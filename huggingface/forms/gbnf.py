"""Grammars as llama.cpp has them (GBNF), in llguidance's dialect of Lark. Pure functions for any thread."""

from __future__ import annotations


def as_lark(grammar: str) -> str:
    """A grammar in Lark; one that has no `start:` is taken for GBNF.

    Raises:
        ValueError: it is no GBNF.
    """
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(grammar))
    except Exception as error:  # of any kind, down to plain `Exception` for a rule that is missing
        raise ValueError(str(error)) from error
