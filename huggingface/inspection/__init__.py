"""Finds out what a model is from its config and the headers of its files, before weights are read."""
