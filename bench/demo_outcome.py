"""What became of the demo's requests: one record each while it runs, one summary per application at the end."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from bench.demo_workload import DemoRequest
from services.client import Finished, Verdict

__all__ = ["ApplicationSummary", "Outcome", "Progress", "Quantiles", "summarise"]


class Progress(StrEnum):
    """How far a request has come, seen from its client."""

    PLANNED = "planned"
    SENT = "sent"
    STREAMING = "streaming"
    ANSWERED = "answered"
    REJECTED = "rejected"
    FAILED = "failed"


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it; filled in while it runs."""

    request: DemoRequest
    progress: Progress = Progress.PLANNED
    verdict: Verdict | None = None
    num_tokens: int = 0
    finished: Finished | None = None
    error: str = ""

    @property
    def admitted(self) -> bool:
        """Promised, on arrival or later."""
        return self.verdict is not None and self.verdict.kind == "ADMITTED"

    def broken_promises(self) -> list[str]:
        """One line per stage that was promised and came late."""
        if self.finished is None or not self.finished.promised:
            return []
        return [
            f"broken promise: {self.request.application} {what} {value_ms:,.1f} of {slo_ms:,.1f} ms "
            f"(slosctl trace {self.finished.trace_id[:12]})"
            for stage in self.finished.stages
            for what, value_ms, slo_ms in (
                ("TTFT", stage.ttft_ms, stage.ttft_slo_ms),
                ("TPOT", stage.tpot_ms, stage.tpot_slo_ms),
            )
            if 0 < slo_ms < value_ms
        ]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Median and 99th percentile, milliseconds; None of nothing. With few samples p99 is near the largest."""

    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class ApplicationSummary:
    """The table's row. `attained` counts requests whose every stage met its SLO; `offered` is its base."""

    application: str
    offered: int
    admitted: int
    best_effort: int
    rejected: int
    failed: int
    ttft: Quantiles
    ttft_slo: Quantiles
    tpot: Quantiles
    tpot_slo_ms: float
    attained: int
    promises: int
    kept: int

    @property
    def attainment(self) -> float:
        """Share of offered requests that met every SLO."""
        return self.attained / self.offered if self.offered else 0.0


def _quantiles(values: Sequence[float]) -> Quantiles:
    if not values:
        return Quantiles(None, None)
    p50, p99 = np.percentile(np.asarray(values), [50, 99])
    return Quantiles(float(p50), float(p99))


def _summarise_one(application: str, outcomes: Sequence[Outcome]) -> ApplicationSummary:
    ended = [outcome.finished for outcome in outcomes if outcome.finished is not None]
    stages = [stage for finished in ended for stage in finished.stages]
    promised = [finished for finished in ended if finished.promised]
    answered = [outcome for outcome in outcomes if outcome.progress is Progress.ANSWERED]
    promises_lost = sum(outcome.admitted and outcome.finished is None for outcome in outcomes)
    return ApplicationSummary(
        application=application,
        offered=len(outcomes),
        admitted=sum(outcome.admitted for outcome in answered),
        best_effort=sum(not outcome.admitted for outcome in answered),
        rejected=sum(outcome.progress is Progress.REJECTED for outcome in outcomes),
        failed=sum(outcome.progress is Progress.FAILED for outcome in outcomes),
        ttft=_quantiles([stage.ttft_ms for stage in stages if stage.ttft_slo_ms > 0]),
        ttft_slo=_quantiles([stage.ttft_slo_ms for stage in stages if stage.ttft_slo_ms > 0]),
        tpot=_quantiles([stage.tpot_ms for stage in stages if stage.output_tokens > 1]),
        tpot_slo_ms=max((stage.tpot_slo_ms for stage in stages), default=0.0),
        attained=sum(finished.met for finished in ended),
        promises=len(promised) + promises_lost,
        kept=sum(finished.met for finished in promised),
    )


def summarise(outcomes: Iterable[Outcome]) -> tuple[ApplicationSummary, ...]:
    """One summary per application, by name."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.request.application, []).append(outcome)
    return tuple(_summarise_one(name, groups[name]) for name in sorted(groups))
