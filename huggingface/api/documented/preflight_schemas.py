"""The contract of preflight: what is told of a model before it is loaded, and of the models in the models folder."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .schemas import Answer, Strict


class PreflightQuery(Strict):
    """Which of a repository's states and files to look at; for a registered model its own, where it is left out."""

    revision: str | None = Field(None, description="A branch, tag or commit of the repository.", min_length=1)
    gguf_file: str | None = Field(None, description="The file that holds the weights as GGUF.", min_length=1)


class WeightFiles(BaseModel):
    """The files that the weights are in."""

    count: int
    names: list[str]


class Details(BaseModel):
    """What config, tokenizer and the heads of the weights tell; what cannot be told is null."""

    model_config = ConfigDict(protected_namespaces=())

    reachable: bool = Field(description="Whether its files could be looked at.")
    problem: str | None = Field(description="Why it cannot be looked at or loaded, and what to do; null if nothing is.")
    source: Literal["local", "cache", "hub"] | None = Field(description="Where: the models folder, the cache, the Hub.")
    commit: str | None = Field(description="Of the repository, where it is one.")
    architecture: str | None = Field(description="Class of the model; of a GGUF file its architecture.")
    config_type: str | None = Field(description="Kind of model: `model_type` in config.json.")
    known: bool | None = Field(description="Whether the installed transformers has this kind; null without any.")
    model_type: str | None = Field(description="The type to register it as; null where that is unknown.")
    tasks: list[str] = Field(description="Tasks that it can do; none where that is unknown.")
    context_length: int | None = Field(description="Tokens that it can read.")
    parameters: int | None = Field(description="By the heads of its files.")
    weights_bytes: int | None = Field(description="Of the files of the weights.")
    dtype: str | None = Field(description="Of most of the weights.")
    dtypes: dict[str, int] = Field(description="Bytes of the weights by type, the most first.")
    quantized: str | None = Field(description="How its maker quantized it, such as `gptq`.")
    chat_template: bool = Field(description="Whether it lays chats out.")
    tools: bool = Field(description="Whether its chat template lays tools out.")
    needs_remote_code: bool = Field(description="Whether it runs only with Python code of its repository.")
    missing_packages: list[str] = Field(description="Python packages that it needs and that are not installed.")
    install: str | None = Field(description="The command that installs them.")
    embedding: bool = Field(description="Whether it is a sentence-transformers model.")
    adapter: str | None = Field(default=None, description="Of a LoRA adapter: the base model; absent for others.")
    adapters: dict[str, str | None] | None = Field(
        default=None, description="Of the adapters that it is registered with: why one cannot be used, or null."
    )
    gguf_files: list[str] | None = Field(default=None, description="GGUF files that it has; absent for others.")
    files: WeightFiles


class PreflightAnswer(Answer):
    """What a model is."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    details: Details


class AvailableQuery(Strict):
    """How much to tell."""

    details: Literal["true", "false"] = Field("false", description="Whether to tell each model's details too.")


class AvailableModel(BaseModel):
    """A model in the models folder."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    registered: bool
    model_type: str | None = Field(description="The type to register it as; null where that is unknown.")
    name: str = Field(description="A display name to register it with.")
    bytes: int = Field(description="Of all its files.")
    gguf_files: list[str]
    problem: str | None = Field(description="Why it cannot be loaded as it is.")
    adapter: str | None = Field(default=None, description="Of a LoRA adapter: the base model; absent for others.")
    details: Details | None = Field(default=None, description="Where they are asked for.")


class AvailableAnswer(Answer):
    """The models in the models folder, sorted by id."""

    models: list[AvailableModel]
    count: int
