"""What a worker process is told."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from services.common.config import ServiceSettings
from services.core.presets import PRESETS

__all__ = ["WorkerSettings"]

ReplicaId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class WorkerSettings(ServiceSettings):
    """Environment variables `SLOS_*` of a worker.

    replica_id: name of this replica; part of its queues' names, so it must be unique in the fleet.
    advertise: address other services reach this worker at, written in its lease; host:port where empty.
    planners: addresses of all planners of the fleet; rendezvous hashing picks this replica's.
    engine: `vllm` runs the model; `emulated` runs the real engine around an executor that only takes the modelled time.
    model: directory or hub id; empty is the bundled model.
    preset: name of the emulated hardware and model (`emulated` only).
    kv_blocks, max_num_seqs, max_model_len, block_size: 0 leaves the choice to the engine (or the preset).
    max_batch_tokens: the engine's own limit on tokens per batch.
    lease_s: how long the replica stays known without a sign of life.
    retention_s: how long output nobody has collected is kept after its end, and how long a request runs on while no
        admission process subscribes to it.
    """

    port: Annotated[int, Field(ge=0, le=65535)] = 50061
    replica_id: ReplicaId = "w0"
    advertise: str = ""
    planners: Annotated[tuple[str, ...], NoDecode] = ("127.0.0.1:50053",)
    engine: Literal["vllm", "emulated"] = "vllm"
    model: str = ""
    preset: str = "qwen2.5-7b-a100"
    kv_blocks: Annotated[int, Field(ge=0)] = 0
    block_size: Annotated[int, Field(ge=0, le=256)] = 0
    max_num_seqs: Annotated[int, Field(ge=0, le=8192)] = 0
    max_model_len: Annotated[int, Field(ge=0)] = 0
    max_batch_tokens: Annotated[int, Field(ge=16, le=131072)] = 8192
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    lease_s: Annotated[float, Field(ge=0.5, le=60)] = 3.0
    retention_s: Annotated[float, Field(ge=1, le=3600)] = 60.0

    @field_validator("planners", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("planners")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one planner as host:port")
        for address in value:
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit():
                raise ValueError(f"{address!r} is not host:port")
        return value

    @model_validator(mode="after")
    def _known_preset(self) -> Self:
        known = sorted(preset.name for preset in PRESETS)
        if self.engine == "emulated" and self.preset not in known:
            raise ValueError(f"preset {self.preset!r} is unknown; known: {', '.join(known)}")
        return self
