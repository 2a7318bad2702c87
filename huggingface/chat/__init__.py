"""Tool calls and reasoning: the forms in which models write them, readers for answers, and grammars for calls.

Readers take text and return parts. Standard library only; must not know models or HTTP.
"""
