"""Anthropic's API under `/v1/messages`: translations onto the same conversations, engine and errors as OpenAI's chats.

Source: https://docs.anthropic.com/en/api/messages. Nothing here generates, loads or parses what a model writes.
"""
