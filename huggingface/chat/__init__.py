"""How models write tool calls and reasoning, and how their answers are read and held to that.

Text in, parts out. Standard library only; it knows neither models nor HTTP.
"""
