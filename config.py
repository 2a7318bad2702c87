"""Every setting of the server, in one table; the only reader of the environment and of `.env`.

A setting `name` is the environment variable `LOCAL_LLM_NAME`. The rest of the project gets values as arguments.
Variables of other libraries (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, …) are not read here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from huggingface.api.http.origins import allowed_origins
from huggingface.manager.budget import parse_limits
from huggingface.types import Backend

_HERE = Path(__file__).resolve().parent
# The folder of `.env` and `data/`: for a checkout its own, wherever the server is started; for an installed server the
# folder in which it is started.
ROOT = _HERE if (_HERE / "pyproject.toml").is_file() else Path.cwd()


class Settings(BaseSettings):
    """The server's settings; a wrong value stops the start with a message that names it."""

    model_config = SettingsConfigDict(
        env_prefix="LOCAL_LLM_",
        env_file=ROOT / ".env",
        extra="ignore",
        frozen=True,
        protected_namespaces=(),
        populate_by_name=True,
    )

    host: str = Field("127.0.0.1", description="Address to listen on. The default is reachable from this machine only.")
    port: int = Field(5000, ge=0, le=65535, description="TCP port to listen on; 0 takes any free one.")
    registry: Path = Field(
        ROOT / "data" / "models.json",
        description="The JSON file that holds the registered models. Default: `data/models.json`.",
    )
    models_dir: Path = Field(
        ROOT / "data" / "models",
        description="Folder of local models, each as `<org>/<name>`; it comes before the Hub. Default: `data/models`.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="Where models run: `auto` (CUDA if there, else CPU), `cpu`, `cuda`, `cuda:1`, `mps`.",
    )
    backend: Literal["auto", Backend] = Field(
        "auto",
        validation_alias=AliasChoices("LOCAL_LLM_BACKEND", "LOCAL_LLM_ENGINE"),  # the latter is its old name
        description="The backend: `auto` (on a CPU llama.cpp for GGUF files, and OpenVINO where it gives torch's "
        "numbers, with torch until its graph is made; else torch), `torch`, `openvino`, `llama.cpp`.",
    )
    threads: int = Field(128, ge=1, le=4096, description="Requests served at once.")
    connection_limit: int = Field(
        1000,
        ge=1,
        description="Connections held open at once; keep it well above `threads`. One more takes the place of the "
        "slowest or longest idle one.",
    )
    receive_timeout: float = Field(
        30.0,
        gt=0,
        description="Seconds that a client may take for the headers of a request, and for its body before "
        "`receive_rate` applies.",
    )
    receive_rate: int = Field(1024, ge=1, description="Bytes per second, on average, with which a body has to arrive.")
    send_timeout: float = Field(
        60.0, gt=0, description="Seconds after which a client that reads nothing of its answer is cut off."
    )
    idle_timeout: float = Field(
        120.0, gt=0, description="Seconds that a connection stays open for the next request of its client."
    )
    max_body_bytes: int = Field(
        16 * 1024**2, ge=1024, description="Largest request body accepted, in bytes; unpacked, where it is compressed."
    )
    max_held_bytes: int = Field(
        256 * 1024**2,
        ge=1024,
        description="Most bytes of request bodies held at once, all together; one more is a 503.",
    )
    import_at_start: bool = Field(
        True,
        description="Import torch and transformers in the background right after the start, before a model needs them.",
    )
    max_batch: int = Field(64, ge=1, le=1024, description="Sequences that one model computes in one batch.")
    max_queue: int = Field(
        64, ge=0, description="Requests that wait for one model beyond those it works on; one more is a 503 at once."
    )
    kv_cache_bytes: int = Field(
        2 * 1024**3,
        ge=1024**2,
        description="Most memory for one model's KV cache, in bytes. It grows as needed.",
    )
    memory_budget: str = Field(
        "0.9",
        description="Most memory for models: `12GB`, a share of what is free, or by device: `cpu=12GB,cuda:0=0.8`.",
    )
    memory_timeout: float = Field(
        5.0,
        ge=0,
        description="Seconds that a load waits for the users of models that it has to evict, before it is refused.",
    )
    keep_alive: float = Field(
        -1.0,
        ge=-1,
        le=10**9,
        description="Seconds in memory after the last use, where request and record set none; -1 is for ever.",
    )
    preload: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Model ids, separated by commas, that are loaded at the start; `/ready` waits for them."
    )
    offline: bool = Field(False, description="Never connect to the Hub; use only files on this machine.")
    busy_timeout: float = Field(
        30.0,
        ge=0,
        description="Seconds that unloading or removing a model waits for its users, before it is refused.",
    )
    allow_pickle: bool = Field(
        False, description="Load weights from pickle files too. Unpickling runs code: only for files that you trust."
    )
    trust_remote_code: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(), description="Model ids, separated by commas, whose own Python code may run here."
    )
    allowed_hosts: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        description="Further names, separated by commas, under which browsers and clients may address this server.",
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Further origins of web pages, separated by commas, that may use this server besides those of this "
        "machine: `https://chat.example`, `https://*.chat.example`, `http://10.0.0.5:*`, `chrome-extension://*`; "
        "`null` for pages from files, `*` for every page.",
    )
    unknown_parameters: Literal["refuse", "ignore"] = Field(
        "refuse",
        description="What happens to an unknown parameter: `refuse` the request, or `ignore` the parameter and "
        "name it in the header `X-Local-LLM-Ignored`.",
    )
    log_level: str = Field(
        "INFO",
        pattern=r"^(DEBUG|INFO|WARNING|ERROR)$",
        description="What the log on the terminal shows: `DEBUG`, `INFO`, `WARNING`, `ERROR`.",
    )

    @field_validator("trust_remote_code", "allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return frozenset(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("preload", "allowed_origins", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        allowed_origins(value)
        return value

    @field_validator("memory_budget")
    @classmethod
    def _amount(cls, value: str) -> str:
        parse_limits(value)
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("registry", "models_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()


def read_settings() -> Settings:
    """Reads the settings of this process; a wrong setting ends the process with a line that names it."""
    try:
        return Settings()
    except ValidationError as error:
        told = ["_".join(str(part) for part in problem["loc"]).upper() for problem in error.errors()]
        names = ["LOCAL_LLM_" + name.removeprefix("LOCAL_LLM_") for name in told]
        lines = [f"  {name}: {problem['msg']}" for name, problem in zip(names, error.errors(), strict=True)]
        sys.exit("\n".join(["Wrong setting:", *lines]))
