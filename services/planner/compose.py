"""The parts of a planner process, put together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.common.clock import Clock
from services.common.config import Catalogue
from services.core.floors import AttainmentFloors
from services.core.lengths import LengthForecaster
from services.core.view import PlanSettings
from services.planner.audit import Auditor, Outcome
from services.planner.fleet import Fleet
from services.planner.observe import Observer
from services.planner.promises import Planning, PlanRun
from services.planner.service import PlannerService
from services.planner.settings import PlannerSettings

__all__ = ["PlannerParts", "compose"]


@dataclass(frozen=True, slots=True)
class PlannerParts:
    """The service, and what its telemetry looks at."""

    service: PlannerService
    fleet: Fleet
    auditor: Auditor


def compose(
    settings: PlannerSettings,
    catalogue: Catalogue,
    clock: Clock,
    *,
    on_run: Sequence[Callable[[PlanRun], None]],
    on_outcome: Callable[[Outcome], None],
) -> PlannerParts:
    """The service with everything behind it. `on_run` see every plan, `on_outcome` sees every promise that ended."""
    tiers = catalogue.tier_list()
    lengths = LengthForecaster()
    floors = AttainmentFloors(floor=settings.attainment_floor)
    plan = PlanSettings(early_spend=settings.early_spend)
    planning = Planning(tiers, settings.policy, plan, tuple(on_run), settings.early_prompt_tokens)
    fleet = Fleet(clock, planning, reservation_s=settings.reservation_s, forget_s=settings.forget_s)
    auditor = Auditor(lengths, floors, on_outcome)
    observer = Observer(fleet, auditor, tiers=tiers, clock=clock)
    service = PlannerService(fleet, observer, catalogue=catalogue, clock=clock, lengths=lengths, floors=floors)
    return PlannerParts(service, fleet, auditor)
