"""Loads models: from a record and files to a model that computes. Imports torch and transformers, so it is imported
late."""
