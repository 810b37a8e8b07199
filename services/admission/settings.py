"""What an admission process is told."""

import os
import re
import socket
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from services.common.config import ServiceSettings

__all__ = ["AdmissionSettings"]

_ADDRESS = re.compile(r"^[A-Za-z0-9._-]+:\d{1,5}$|^\[[0-9A-Fa-f:.]+\]:\d{1,5}$")


def _own_id() -> str:
    return f"admission-{socket.gethostname()[:32]}-{os.getpid()}-{os.urandom(3).hex()}"


class AdmissionSettings(ServiceSettings):
    """Environment variables `SLOS_*` of the front door.

    admission_id: names this process in queue entries and at workers; two live processes must differ.
    routers: addresses of the routers, comma-separated; any router serves any request.
    model: directory or hub id that holds `tokenizer.json`.
    rescue_patience_s: how long a request whose worker died is offered again before its client gets an error.
    keep_finished_s: how long the output of an ended request stays available to `Resume`.
    max_placing: so many requests may wait for their place at a time; what comes beyond is told when to come back.
    """

    port: Annotated[int, Field(ge=0, le=65535)] = 50051
    admission_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")] = Field(default_factory=_own_id)
    routers: Annotated[tuple[str, ...], NoDecode] = ("127.0.0.1:50052",)
    model: str
    rescue_patience_s: Annotated[float, Field(ge=0, le=600)] = 10.0
    keep_finished_s: Annotated[float, Field(ge=0, le=3600)] = 60.0
    max_placing: Annotated[int, Field(ge=1, le=100_000)] = 1000

    @field_validator("routers", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("routers")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("give at least one host:port")
        for address in value:
            if not _ADDRESS.match(address):
                raise ValueError(f"{address!r} is not host:port")
        return value
