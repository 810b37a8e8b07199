"""Measuring a replica: a sweep of real batches through the engine, the fit, and the cache of fitted models."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.core.perf_model import PerfModel
from services.worker.engine_settings import EngineSettings

if TYPE_CHECKING:
    from services.worker.vllm_engine import VllmEngine

__all__ = ["ReplicaProfile", "load_or_measure"]


@dataclass(frozen=True, slots=True)
class ReplicaProfile:
    """A fitted model and its R2 on batches that did not take part in the fit."""

    model: PerfModel
    r2_heldout: float


async def load_or_measure(engine: "VllmEngine", settings: EngineSettings) -> ReplicaProfile:
    """The cached profile."""
    raise NotImplementedError
