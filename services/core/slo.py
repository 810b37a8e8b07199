"""SLOs as numbers: stages, TPOT tiers and the deadlines they turn into. All times are monotonic seconds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from services.core.errors import BadSloError, SloTooTightError
from services.core.perf_model import PerfModel

__all__ = [
    "BEST_EFFORT",
    "StageKind",
    "StageSlo",
    "Tier",
    "VerdictMode",
    "resolve_ttft_s",
    "tier_for",
    "token_deadline_s",
]

BEST_EFFORT = "best-effort"
"""Name of the tier without a promise. In views it has the tier index -1."""


class StageKind(StrEnum):
    """What the model is doing in a stage; prefill is a phase of every stage, not a stage."""

    THINK = "THINK"
    TOOL_CALL = "TOOL_CALL"
    ANSWER = "ANSWER"


class VerdictMode(StrEnum):
    """When an application wants its verdict; `services.core.verdict` says what each mode costs."""

    EARLY = "early"
    LATE = "late"
    FIRM = "firm"


@dataclass(frozen=True, slots=True)
class Tier:
    """A configured TPOT class. `tpot_s` is the time between two tokens that every member is planned at, seconds."""

    name: str
    tpot_s: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tpot_s) and self.tpot_s > 0):
            raise BadSloError(f"tier {self.name!r}: tpot_s must be a positive number of seconds, got {self.tpot_s}")


@dataclass(frozen=True, slots=True)
class StageSlo:
    """What is promised about one stage.

    The first-token time is either absolute (`ttft_s`, seconds) or a multiple of the zero-load prefill time
    (`ttft_slowdown`); neither means the stage continues the previous one without a prefill of its own.
    `end_token_id` is the token after which the stage is over (None: only `max_tokens` ends it).
    """

    kind: StageKind
    ttft_s: float | None
    ttft_slowdown: float | None
    tpot_s: float
    max_tokens: int
    end_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.ttft_s is not None and self.ttft_slowdown is not None:
            raise BadSloError("a stage states ttft_s or ttft_slowdown, not both")
        for name, value in (("ttft_s", self.ttft_s), ("ttft_slowdown", self.ttft_slowdown), ("tpot_s", self.tpot_s)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise BadSloError(f"{name} must be a positive number, got {value}")
        if self.max_tokens < 1:
            raise BadSloError(f"max_tokens must be at least 1, got {self.max_tokens}")


def tier_for(tpot_s: float, tiers: Sequence[Tier]) -> int:
    """Index in `tiers` of the loosest tier that still meets a TPOT SLO of `tpot_s` seconds.

    Raises SloTooTightError if no tier is tight enough.
    """
    fitting = [index for index, tier in enumerate(tiers) if tier.tpot_s <= tpot_s]
    if not fitting:
        tightest = min((tier.tpot_s for tier in tiers), default=math.inf)
        raise SloTooTightError(f"TPOT of {tpot_s * 1e3:g} ms is tighter than the tightest tier, {tightest * 1e3:g} ms")
    return max(fitting, key=lambda index: tiers[index].tpot_s)


def resolve_ttft_s(
    stage: StageSlo, uncached_prompt_tokens: int, model: PerfModel, floor_s: float = 0.100
) -> float | None:
    """TTFT of a stage in seconds; None if the stage promises no first-token time.

    A slowdown is resolved against `model` (the reference coefficients of the served model) and never goes below
    `floor_s`; an absolute TTFT is taken as it is.
    """
    if stage.ttft_s is not None:
        return stage.ttft_s
    if stage.ttft_slowdown is None:
        return None
    return max(floor_s, stage.ttft_slowdown * model.zero_load_prefill_s(uncached_prompt_tokens))


def token_deadline_s(first_token_s: float, token_number: int, tpot_s: float) -> float:
    """Deadline of token `token_number` (1 is the first) of a stage: `t_first + (n - 1) * TPOT`."""
    return first_token_s + (token_number - 1) * tpot_s
