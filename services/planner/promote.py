"""Best-effort requests that wait in an engine and could still be promised: who they are, offered as candidates."""

import math
from collections.abc import Iterator, Sequence

from services.common.clock import Clock
from services.core.errors import SloTooTightError
from services.core.slo import StageKind, StageSlo, Tier, tier_for
from services.core.view import BEST_EFFORT_TIER, Prefill
from services.planner.candidates import Candidate
from services.planner.ledger import Ledger
from services.planner.state import EngineEntry

__all__ = ["promotable"]

_MOST = 32


def promotable(ledger: Ledger, tiers: Sequence[Tier], clock: Clock) -> list[Candidate]:
    """Requests without a promise whose first token is still due, most urgent first, a bounded number of them."""
    now_s = clock.now_s()
    due = sorted(
        (entry.ttft_deadline_s, request_id)
        for request_id, entry in ledger.entries.items()
        if isinstance(entry.planned, Prefill)
        and entry.planned.tier == BEST_EFFORT_TIER
        and now_s < entry.ttft_deadline_s < math.inf
        and ledger.reservation((request_id, entry.attempt)) is None
    )
    return list(_candidates(ledger, [request_id for _, request_id in due[:_MOST]], tiers))


def _candidates(ledger: Ledger, request_ids: Sequence[str], tiers: Sequence[Tier]) -> Iterator[Candidate]:
    for request_id in request_ids:
        entry = ledger.entries[request_id]
        try:
            tier = tier_for(entry.asked_tpot_s, tiers) if math.isfinite(entry.asked_tpot_s) else BEST_EFFORT_TIER
        except SloTooTightError:
            continue
        if tier != BEST_EFFORT_TIER:
            yield _candidate(entry, tier, _ttft_s(ledger, request_id))


def _ttft_s(ledger: Ledger, request_id: str) -> float | None:
    """The first-token SLO, as the verdict on its arrival stated it; None where another process gave that verdict."""
    said = ledger.history.get(request_id)
    return said.verdict.ttft_slo_ms / 1000 if said is not None and said.verdict.ttft_slo_ms > 0 else None


def _candidate(entry: EngineEntry, tier: int, ttft_s: float | None) -> Candidate:
    planned = entry.planned
    assert isinstance(planned, Prefill)
    prefill = Prefill(
        id=planned.id,
        tier=tier,
        deadline_s=entry.ttft_deadline_s,
        tpot_s=entry.asked_tpot_s,
        prompt_tokens=planned.prompt_tokens,
        computed_tokens=planned.computed_tokens,
        output_tokens=planned.output_tokens,
        started=planned.started,
        application=planned.application,
        arrival_s=math.nan if ttft_s is None else entry.ttft_deadline_s - ttft_s,
    )
    slo = StageSlo(StageKind.ANSWER, ttft_s, None, entry.asked_tpot_s, max(1, entry.max_tokens))
    return Candidate(entry.attempt, prefill, slo, entry.max_tokens)
