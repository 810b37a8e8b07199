"""What a fleet process is told. What its workers are told are their own `SLOS_*` variables, which it passes on."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from services.common.config import ServiceSettings
from services.core.scaling import ScalingPolicy

__all__ = ["FleetSettings"]

Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class FleetSettings(ServiceSettings):
    """Environment variables `SLOS_*` of the fleet; each is an option of the command line as well.

    replicas: how many to start with. min_replicas, max_replicas: bounds of scaling; 0 is `replicas`, so that a fleet
        keeps its size unless told otherwise.
    ray_address: a running cluster (host:port or `auto`); empty starts a Ray of its own on this machine.
    replica_prefix: the replicas are called prefix-0, prefix-1...
    cpus, gpus: what one replica reserves of a Ray node.
    max_starting: so many replicas start at the same time.
    The rest is the hysteresis of services/core/scaling.py.
    """

    replicas: Annotated[int, Field(ge=0, le=10_000)] = 1
    min_replicas: Annotated[int, Field(ge=0, le=10_000)] = 0
    max_replicas: Annotated[int, Field(ge=0, le=10_000)] = 0
    ray_address: str = ""
    replica_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,50}$")] = "ray"
    cpus: Annotated[float, Field(ge=0, le=1024)] = 1.0
    gpus: Annotated[float, Field(ge=0, le=64)] = 0.0
    max_starting: Annotated[int, Field(ge=1, le=1000)] = 2
    scale_every_s: Seconds = 1.0
    scale_decline_out: Share = 0.05
    scale_decline_in: Share = 0.005
    scale_spare_idle: Annotated[float, Field(ge=1, le=1000)] = 1.25
    scale_out_after_s: Seconds = 5.0
    scale_in_after_s: Seconds = 120.0
    scale_window_s: Seconds = 10.0

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        policy = self.policy
        if not policy.min_replicas <= self.replicas <= policy.max_replicas:
            raise ValueError(f"replicas: {self.replicas} is not between min_replicas and max_replicas")
        if policy.decline_in > policy.decline_out:
            raise ValueError("scale_decline_in: must not be above scale_decline_out")
        return self

    @property
    def policy(self) -> ScalingPolicy:
        """Bounds and hysteresis for the core."""
        return ScalingPolicy(
            min_replicas=self.min_replicas or self.replicas,
            max_replicas=self.max_replicas or self.replicas,
            decline_out=self.scale_decline_out,
            decline_in=self.scale_decline_in,
            spare_idle=self.scale_spare_idle,
            out_after_s=self.scale_out_after_s,
            in_after_s=self.scale_in_after_s,
            window_s=self.scale_window_s,
        )
