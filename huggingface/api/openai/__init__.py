"""OpenAI's API under `/v1`: translations onto the same manager, engine and tasks as the documented routes.

Source: https://platform.openai.com/docs/api-reference. Nothing here generates, loads or parses what a model writes.
"""
