"""OpenAI's API under `/v1`: translations to the same manager, engine and tasks as the documented routes.

Source: https://platform.openai.com/docs/api-reference. Must not generate, load, or parse what a model writes.
"""
