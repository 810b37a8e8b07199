"""Stated SLOs turned into milliseconds, and refused where even an idle fleet could not meet them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.common.errors import Reason, SloServeError
from services.core.errors import SloTooTightError
from services.core.perf_model import BatchShape, PerfModel
from services.core.slo import StageSlo, Tier, resolve_ttft_s, tier_for

__all__ = ["ReplicaSpeed", "resolve_stages", "stage_tiers"]

NO_REPLICA_RETRY_MS = 1000.0


@dataclass(frozen=True, slots=True)
class ReplicaSpeed:
    """A live replica's name and performance model."""

    replica_id: str
    model: PerfModel

    def idle_ttft_s(self, prompt_tokens: int) -> float:
        """First token of a prompt on this replica with nothing else running, seconds."""
        return self.model.zero_load_prefill_s(prompt_tokens)

    def idle_tpot_s(self, prompt_tokens: int) -> float:
        """One decode step of one request alone, seconds."""
        return self.model.seconds(BatchShape(tokens=1, context_tokens=prompt_tokens, requests=1))


def resolve_stages(
    stages: Sequence[StageSlo], prompt_tokens: int, speeds: Sequence[ReplicaSpeed], floor_s: float
) -> tuple[StageSlo, ...]:
    """Stages with every slowdown turned into seconds, against the fastest live replica.

    UNAVAILABLE (NO_REPLICA) where none is live; FAILED_PRECONDITION (SLO_IMPOSSIBLE), with the numbers, where no
    replica could meet all stages even idle.
    """
    if not speeds:
        raise SloServeError(Reason.NO_REPLICA, "no replica is live", retry_after_ms=NO_REPLICA_RETRY_MS)
    fastest = min(speeds, key=lambda speed: speed.idle_ttft_s(prompt_tokens))
    resolved = tuple(
        replace(stage, ttft_s=resolve_ttft_s(stage, prompt_tokens, fastest.model, floor_s=floor_s), ttft_slowdown=None)
        for stage in stages
    )
    if not any(_possible(resolved, prompt_tokens, speed) for speed in speeds):
        raise SloServeError(Reason.SLO_IMPOSSIBLE, _why_impossible(resolved, prompt_tokens, speeds))
    return resolved


def stage_tiers(stages: Sequence[StageSlo], tiers: Sequence[Tier]) -> tuple[str, ...]:
    """Tier of each stage; FAILED_PRECONDITION (SLO_IMPOSSIBLE) where one is tighter than every configured tier."""
    names = []
    for index, stage in enumerate(stages):
        try:
            names.append(tiers[tier_for(stage.tpot_s, tiers)].name)
        except SloTooTightError as error:
            raise SloServeError(Reason.SLO_IMPOSSIBLE, f"stages[{index}].tpot_ms: {error}") from None
    return tuple(names)


def _possible(stages: Sequence[StageSlo], prompt_tokens: int, speed: ReplicaSpeed) -> bool:
    ttft_s = stages[0].ttft_s
    first_token_ok = ttft_s is None or speed.idle_ttft_s(prompt_tokens) <= ttft_s
    return first_token_ok and speed.idle_tpot_s(prompt_tokens) <= min(stage.tpot_s for stage in stages)


def _why_impossible(stages: Sequence[StageSlo], prompt_tokens: int, speeds: Sequence[ReplicaSpeed]) -> str:
    ttft_s, tpot_s = stages[0].ttft_s, min(stage.tpot_s for stage in stages)
    best_ttft = min(speeds, key=lambda speed: speed.idle_ttft_s(prompt_tokens))
    best_tpot = min(speeds, key=lambda speed: speed.idle_tpot_s(prompt_tokens))
    reasons = []
    if ttft_s is not None and best_ttft.idle_ttft_s(prompt_tokens) > ttft_s:
        reasons.append(
            f"TTFT {ttft_s * 1000:g} ms: the fastest replica ({best_ttft.replica_id}) needs "
            f"{best_ttft.idle_ttft_s(prompt_tokens) * 1000:.1f} ms for {prompt_tokens} prompt tokens when idle"
        )
    if best_tpot.idle_tpot_s(prompt_tokens) > tpot_s:
        reasons.append(
            f"TPOT {tpot_s * 1000:g} ms: the fastest replica ({best_tpot.replica_id}) needs "
            f"{best_tpot.idle_tpot_s(prompt_tokens) * 1000:.1f} ms per token when idle"
        )
    if not reasons:
        reasons.append("no single replica can meet both its TTFT and its TPOT, not even idle")
    return "; ".join(reasons)
