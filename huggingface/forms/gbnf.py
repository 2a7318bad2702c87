"""Translates llama.cpp's grammars (GBNF) into llguidance's dialect of Lark. Pure functions for any thread."""

from __future__ import annotations


def as_lark(grammar: str) -> str:
    """Returns a grammar in Lark; a grammar without `start:` is read as GBNF.

    Raises:
        ValueError: the grammar is not valid GBNF.
    """
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(grammar))
    except Exception as error:  # it raises many kinds, even plain `Exception` for a missing rule
        raise ValueError(str(error)) from error
