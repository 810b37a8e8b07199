"""A candidate as a router sends it, checked once and turned into what the core decides on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from protos import planner_pb2
from services.common.clock import Clock
from services.common.errors import FieldViolation, InvalidRequestError, SloServeError
from services.common.wire import stages_from_wire, tier_index, verdict_mode_from_wire
from services.core.lengths import LengthForecaster
from services.core.slo import StageSlo, Tier, VerdictMode
from services.core.view import Prefill

__all__ = ["Candidate", "parse_candidate"]

_MAX_AWAY_S = 86_400.0
_MAX_SKEW_S = 60.0
_MAX_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checked candidate. `prefill` is what the core decides on, `slo` the first stage, `attempt` its fence.

    `mode`: when its verdict is wanted. `slip_s`: what was taken off the deadline it is planned with, for its way to the
    engine.
    """

    attempt: int
    prefill: Prefill
    slo: StageSlo
    max_tokens: int
    mode: VerdictMode = VerdictMode.FIRM
    slip_s: float = 0.0

    @property
    def key(self) -> tuple[str, int]:
        """What the planner is idempotent by."""
        return (self.prefill.id, self.attempt)

    @property
    def due_s(self) -> float:
        """When its first token is due, monotonic seconds."""
        return self.prefill.deadline_s + self.slip_s

    def less_slip(self, slip_s: float) -> "Candidate":
        """The candidate as it is planned where its way to the engine takes `slip_s`."""
        sooner = replace(self.prefill, deadline_s=self.prefill.deadline_s - slip_s)
        return replace(self, prefill=sooner, slip_s=self.slip_s + slip_s)


def parse_candidate(
    wire: planner_pb2.Candidate,
    field: str,
    *,
    tiers: Sequence[Tier],
    clock: Clock,
    lengths: LengthForecaster,
    weight: int = 1,
) -> Candidate:
    """Check a candidate; every violation is named under `field` in an `InvalidRequestError`.

    It is planned at its tightest stage, because a promise covers all of them.
    """
    _check_numbers(wire, field, clock)
    stages, tier_rows = _stages(wire, field, tiers)
    max_tokens = wire.max_tokens or sum(stage.max_tokens for stage in stages)
    forecast = lengths.forecast(wire.application, wire.prompt_tokens, max_tokens)
    prefill = Prefill(
        id=wire.request_id,
        tier=min(tier_rows, key=lambda row: tiers[row].tpot_s),
        deadline_s=clock.to_monotonic_s(wire.ttft_deadline_us),
        tpot_s=min(stage.tpot_s for stage in stages),
        prompt_tokens=wire.prompt_tokens,
        computed_tokens=wire.cached_tokens,
        output_tokens=forecast.mean_tokens,
        application=wire.application,
        weight=weight,
        arrival_s=clock.to_monotonic_s(wire.arrival_us) if wire.arrival_us else math.nan,
        in_hand_s=max(0.0, wire.delivery_spread_us / 1e6),
    )
    return Candidate(wire.attempt, prefill, stages[0], max_tokens, verdict_mode_from_wire(wire.verdict_mode))


def _check_numbers(wire: planner_pb2.Candidate, field: str, clock: Clock) -> None:
    away_s = (wire.ttft_deadline_us - clock.now_us()) / 1e6
    future_s = (wire.arrival_us - clock.now_us()) / 1e6
    checks = [
        ("request_id", bool(wire.request_id), "must not be empty"),
        ("attempt", wire.attempt >= 1, "counts from 1"),
        ("prompt_tokens", 1 <= wire.prompt_tokens <= _MAX_TOKENS, f"must be 1 to {_MAX_TOKENS}"),
        ("cached_tokens", wire.cached_tokens <= wire.prompt_tokens, "more tokens cached than there are"),
        ("max_tokens", wire.max_tokens <= _MAX_TOKENS, f"must be at most {_MAX_TOKENS}"),
        ("ttft_deadline_us", abs(away_s) <= _MAX_AWAY_S, f"is {away_s:.0f} s from now, at most a day is planned"),
        (
            "ttft_deadline_us",
            not wire.arrival_us or wire.ttft_deadline_us > wire.arrival_us,
            "lies before the request's own arrival",
        ),
        ("arrival_us", future_s <= _MAX_SKEW_S, f"lies {future_s:.0f} s in the future"),
    ]
    bad = [FieldViolation(f"{field}.{name}", text) for name, fine, text in checks if not fine]
    if bad:
        raise InvalidRequestError(*bad)


def _stages(wire: planner_pb2.Candidate, field: str, tiers: Sequence[Tier]) -> tuple[tuple[StageSlo, ...], list[int]]:
    try:
        stages = stages_from_wire(wire.stages)
        rows = [tier_index(stage.tier, tiers) for stage in wire.stages]
    except SloServeError as error:
        raise InvalidRequestError(FieldViolation(f"{field}.stages", error.text)) from None
    bad = [
        FieldViolation(f"{field}.stages[{index}].tier", "a candidate for a promise needs a tier that holds its TPOT")
        for index, (stage, row) in enumerate(zip(stages, rows, strict=True))
        if row < 0 or tiers[row].tpot_s > stage.tpot_s * (1 + 1e-9)
    ]
    if bad:
        raise InvalidRequestError(*bad)
    return stages, rows
