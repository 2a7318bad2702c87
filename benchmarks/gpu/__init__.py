"""Proof of the server on one accelerator: exactness, memory, speed, robustness; in minutes, and without network."""
