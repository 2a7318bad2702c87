"""From a record and files to a model that computes. Imports torch and transformers, so it is itself imported late."""
