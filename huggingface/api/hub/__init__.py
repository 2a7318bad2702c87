"""Hugging Face's own protocols: its inference API, and what TGI and TEI answer about themselves."""
