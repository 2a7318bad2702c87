"""Hugging Face's own protocols: its inference API, and TGI's and TEI's routes about a model."""
