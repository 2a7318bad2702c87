"""The contract on downloads as pydantic models: bodies and answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from .schemas import Answer, Strict, streaming


class DownloadBody(Strict):
    """How the download answers."""

    model_config = ConfigDict(openapi_extra={"required": False})  # type: ignore[typeddict-unknown-key]

    stream: StrictBool = Field(False, description="Send its progress as server-sent events, until it is over.")


class Download(BaseModel):
    """The progress of a download. Bytes count all files that the model needs; files that were here count as done."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    revision: str | None = Field(
        description="The branch, tag or commit that was asked for; null is the default branch."
    )
    commit: str | None = Field(description="The revision's commit, once it is known.")
    phase: Literal["waiting", "download", "ready", "failed", "cancelled", "interrupted"] = Field(
        description="`interrupted`: an earlier run of this server began it; a new download continues from there."
    )
    bytes_done: int
    bytes_total: int | None = Field(description="Null while it is not known.")
    bytes_per_second: int = Field(description="The mean of the last seconds.")
    seconds_left: float | None
    fraction: float | None = Field(description="The part that is done, 0 to 1.")
    file: str | None = Field(description="The file that is downloaded now.")
    error: str | None


class DownloadAnswer(Answer):
    """The requested download."""

    model_config = streaming("The progress, as in `download`, and last this answer, or a failure.")

    message: str
    download: Download


class DownloadState(Answer):
    """The state of a download."""

    download: Download
