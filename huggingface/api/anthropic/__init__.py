"""Anthropic's API under `/v1/messages`: translations to the same conversations, engine and errors as OpenAI's chats.

Source: https://docs.anthropic.com/en/api/messages. Must not generate, load, or parse what a model writes.
"""
