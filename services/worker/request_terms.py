"""What travels with a request into the engine process: its deadlines, stages and identity.

Carried in `SamplingParams.extra_args["slos"]` as plain numbers, strings and lists. Times are monotonic seconds of this
host, which the worker process and the engine process share.
"""

import math
from typing import Any

import msgspec

from services.core.slo import BEST_EFFORT, StageKind, StageSlo, VerdictMode
from services.worker.engine_api import Submission

__all__ = [
    "EXTRA_ARG",
    "ProbeTerms",
    "RequestTerms",
    "StageTerms",
    "from_extra_args",
    "probe_terms",
    "terms_of",
    "to_extra_args",
]

EXTRA_ARG = "slos"


class StageTerms(msgspec.Struct, frozen=True, array_like=True):
    """One stage: the tier it belongs to, its time per token, and where it ends."""

    kind: str
    tier: str
    tpot_s: float
    max_tokens: int
    end_token_id: int | None

    def slo(self) -> StageSlo:
        """The stage as the core's stage tracker reads it; deadlines are resolved already."""
        return StageSlo(StageKind(self.kind), None, None, self.tpot_s, self.max_tokens, self.end_token_id)


class ProbeTerms(msgspec.Struct, frozen=True, array_like=True):
    """A request that measures: it waits for the `requests` of its probe and then runs in batches of `budget` tokens.

    While it decodes, every step verifies `draft_steps` drafts, which it makes certain by repeating one token.
    """

    requests: int
    budget: int
    draft_steps: int = 0


class RequestTerms(msgspec.Struct, frozen=True, array_like=True):
    """One attempt of a request, as `Submission` but without the prompt and the sampling."""

    request_id: str
    attempt: int
    application: str
    promised: bool
    ttft_deadline_s: float
    arrival_s: float
    forecast_tokens: int
    digest: str
    delivered_tokens: int
    first_token_s: float | None
    stages: tuple[StageTerms, ...]
    probe: ProbeTerms | None = None
    pending: bool = False
    verdict_mode: VerdictMode = VerdictMode.FIRM
    weight: int = 1
    accepted_at_s: float = math.nan
    delivery_spread_s: float = 0.0


def terms_of(submission: Submission) -> RequestTerms:
    """The terms of a submission."""
    stages = tuple(
        StageTerms(stage.kind.value, tier, stage.tpot_s, stage.max_tokens, stage.end_token_id)
        for stage, tier in zip(submission.stages, submission.tiers, strict=True)
    )
    return RequestTerms(
        submission.request_id,
        submission.attempt,
        submission.application,
        submission.promised,
        submission.ttft_deadline_s,
        submission.arrival_s,
        submission.forecast_tokens,
        submission.prompt_digest,
        submission.delivered_tokens,
        submission.first_token_s,
        stages,
        pending=submission.pending,
        verdict_mode=submission.verdict_mode,
        weight=submission.weight,
        accepted_at_s=submission.accepted_at_s,
        delivery_spread_s=submission.delivery_spread_s,
    )


def to_extra_args(terms: RequestTerms) -> dict[str, Any]:
    """The value for `SamplingParams.extra_args`."""
    return {EXTRA_ARG: msgspec.to_builtins(terms)}


def probe_terms(request_id: str, max_tokens: int, probe: ProbeTerms | None) -> RequestTerms:
    """The terms of a request without any: best effort in a single stage."""
    stage = StageTerms(StageKind.ANSWER.value, BEST_EFFORT, 1.0, max_tokens, None)
    return RequestTerms(request_id, 0, "", False, float("inf"), 0.0, max_tokens, "", 0, None, (stage,), probe)


def from_extra_args(extra_args: dict[str, Any] | None, request_id: str, max_tokens: int) -> RequestTerms:
    """The terms in `extra_args`; a request that brings none is best effort with a single stage."""
    raw = (extra_args or {}).get(EXTRA_ARG)
    if raw is None:
        return probe_terms(request_id, max_tokens, None)
    return msgspec.convert(raw, RequestTerms)
