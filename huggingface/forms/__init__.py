"""Forms that a text can be held to, in llguidance's notation, and the processes that compile and follow them.

Standard library and llguidance only, and this file imports nothing: `process` runs without the rest of the package.
"""
