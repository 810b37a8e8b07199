"""How requests of each application end on this engine, and what that makes their pending successors worth.

An application whose attainment here is under its floor counts ten times as heavy (`services.core.floors`), on top of
the weight its requests bring. Counted is every request that came with a tier: when it ends by itself, or when it is
declined, whichever is first.
"""

from services.core.floors import AttainmentFloors
from services.worker.hook_request import TrackedRequest

__all__ = ["Outcomes"]


class Outcomes:
    """Attainment per application as this engine sees it. A floor of 0 switches it off."""

    def __init__(self, floor: float) -> None:
        self._floors = AttainmentFloors(floor=floor)

    def ended(self, request: TrackedRequest, at_s: float) -> None:
        """A request produced its last token."""
        self._count(request, request.met(at_s))

    def lost(self, request: TrackedRequest) -> None:
        """It will not meet its SLO: declined, or its promise is lost."""
        self._count(request, False)

    def weight(self, request: TrackedRequest) -> int:
        """What keeping a pending request is worth now."""
        return self._floors.weight(request.terms.application, request.terms.weight)

    def attainment(self, application: str) -> float:
        """Running attainment of an application."""
        return self._floors.attainment(application)

    def _count(self, request: TrackedRequest, met: bool) -> None:
        if request.offered:
            request.offered = False
            self._floors.observe(request.terms.application, met)
