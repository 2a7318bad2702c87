"""Ollama's API under `/api`: translations onto the same manager, engine and downloads as the documented routes.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md and its `api/types.go`. Nothing here generates, loads,
downloads or parses what a model writes.
"""
