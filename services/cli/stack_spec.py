"""What a local stack consists of, as one frozen value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

__all__ = ["EngineName", "ServiceEvent", "ServiceState", "StackSpec"]

EngineName = Literal["vllm", "emulated"]

BUNDLED_MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny"
CATALOGUE = Path(__file__).resolve().parents[2] / "deploy" / "slos.yaml"


class ServiceState(StrEnum):
    """Where a service of the stack is in its life."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ServiceEvent:
    """A service changed state; `elapsed_s` counts from when that change began."""

    name: str
    state: ServiceState
    address: str
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class StackSpec:
    """Which services to run, where, and with which settings.

    `base_port` None finds free ports; a number gives admission that port, router the next, planner the one after, and
    redis four and workers ten above (50051, 50052, 50053, 50055,
    50061...). `environment` goes to every service, `service_environment` to the
    ones it names (`worker`, or one of them, `worker-1`). `starting_workers` start at the same time, for an engine needs
    a core or two and much memory just then; `start_timeout_s` is for each process by itself.
    """

    data_dir: Path
    engine: EngineName = "vllm"
    model: str = str(BUNDLED_MODEL)
    preset: str | None = None
    num_workers: int = 1
    num_admissions: int = 1
    num_routers: int = 1
    num_planners: int = 1
    base_port: int | None = None
    redis_url: str | None = None
    catalogue: Path = CATALOGUE
    start_timeout_s: float = 240.0
    starting_workers: int = 2
    drain_grace_s: float = 10.0
    environment: Mapping[str, str] = field(default_factory=dict)
    service_environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
