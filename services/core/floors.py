"""A floor under every application's attainment.

Moore-Hodgson drops what is longest, so applications with long prompts would pay for everybody. An application whose
running attainment is under its floor therefore counts ten times as heavy until it has recovered: the drop key of its
requests is divided by ten, and the dynamic program sees the same integer weight.
"""

from dataclasses import dataclass

__all__ = ["FLOOR_WEIGHT", "AttainmentFloors"]

FLOOR_WEIGHT = 10


@dataclass(slots=True)
class _Running:
    """Exponentially weighted share of requests that met their SLO."""

    attainment: float = 1.0
    seen: int = 0


class AttainmentFloors:
    """Follows attainment per application; `memory` is how many recent requests count."""

    def __init__(self, *, floor: float = 0.85, memory: int = 50) -> None:
        self._floor = floor
        self._memory = memory
        self._running: dict[str, _Running] = {}

    def observe(self, application: str, met: bool) -> None:
        """A request of the application ended, or became hopeless: did it meet its SLO?"""
        running = self._running.setdefault(application, _Running())
        running.seen += 1
        alpha = max(1.0 / self._memory, 1.0 / (running.seen + 5))
        running.attainment += alpha * (float(met) - running.attainment)

    def attainment(self, application: str) -> float:
        """Running attainment, 1.0 for an application never seen."""
        running = self._running.get(application)
        return running.attainment if running else 1.0

    def weight(self, application: str, weight: int = 1) -> int:
        """The weight to plan a request of the application with."""
        return weight * FLOOR_WEIGHT if self.attainment(application) < self._floor else weight
