"""What a router process is told."""

import re
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from services.common.config import ServiceSettings
from services.core.placement import OrderName

__all__ = ["RouterSettings"]

_ADDRESS = re.compile(r"^[A-Za-z0-9._-]+:\d{1,5}$|^\[[0-9A-Fa-f:.]+\]:\d{1,5}$")


class RouterSettings(ServiceSettings):
    """Environment variables `SLOS_*` of the router.

    planners: addresses of all planners, comma-separated; every router and worker must be told the same ones.
    order: in which order replicas of no affinity are asked; see services/core/placement.py.
    max_hops: so many replicas are asked about a request in one round; the last of them is the least loaded one.
    admit_timeout_ms: how long one planner may take over one question before it counts as away.
    reoffer_ms: how often a waiting request is offered again.
    best_effort_limit: unread entries of the shared queue beyond which requests are shed; 0 for no limit.
    max_losses: a request under which so many workers died is what kills them: it fails and becomes a dead letter.
    forgotten_s: a request whose worker died and whose admission process, alive, does nothing about it is cancelled
        after that long; more than the admissions' rescue_patience_s.
    """

    port: Annotated[int, Field(ge=0, le=65535)] = 50052
    planners: Annotated[tuple[str, ...], NoDecode] = ("127.0.0.1:50053",)
    order: OrderName = OrderName.FULLEST_FIRST
    max_hops: Annotated[int, Field(ge=1, le=1000)] = 8
    admit_timeout_ms: Annotated[float, Field(ge=1, le=60_000)] = 1_000.0
    reoffer_ms: Annotated[float, Field(ge=10, le=10_000)] = 100.0
    best_effort_limit: Annotated[int, Field(ge=0)] = 10_000
    max_losses: Annotated[int, Field(ge=1, le=100)] = 3
    forgotten_s: Annotated[float, Field(ge=1, le=3600)] = 60.0

    @field_validator("planners", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("planners")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("give at least one host:port")
        for address in value:
            if not _ADDRESS.match(address):
                raise ValueError(f"{address!r} is not host:port")
        return value
