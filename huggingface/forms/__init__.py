"""Constraints in llguidance's notation, and the processes that compile and follow them. A form is one constraint.

Standard library and llguidance only, and this file imports nothing: `process` runs without the rest of the package.
"""
