"""When a plan's answer becomes a promise.

| mode  | promised                                                              | what it costs                   |
|-------|-----------------------------------------------------------------------|---------------------------------|
| FIRM  | on arrival or not at all                                              | 0 (KV-bound chat) to 25 % (code)|
| EARLY | cheap prompts on arrival, the rest when their prefill starts          | nothing for the cheap ones      |
| LATE  | with the first token                                                  | nothing                         |

Until then a request is PENDING and may still give way to others. Price list: measured capacities of the policy study.
"""

from collections.abc import Iterable, Set
from enum import StrEnum

from services.core.admission import Decision
from services.core.constraint import ConstraintKind
from services.core.slo import VerdictMode
from services.core.view import Prefill

__all__ = ["EARLY_PROMPT_TOKENS", "VerdictKind", "displaces", "verdict_at_first_token", "verdict_for"]

EARLY_PROMPT_TOKENS = 1000
"""Prompts up to this long are cheap enough to be promised on arrival."""


class VerdictKind(StrEnum):
    """Where a request stands now. DECLINED: this replica will not promise it; offer it elsewhere or to best effort."""

    PENDING = "pending"
    ADMITTED = "admitted"
    DECLINED = "declined"


def verdict_for(
    mode: VerdictMode,
    request: Prefill,
    decision: Decision,
    *,
    starting: bool = False,
    early_prompt_tokens: int = EARLY_PROMPT_TOKENS,
) -> VerdictKind:
    """The verdict that a decision on `request` amounts to.

    `starting`: its first prefill chunk is in the batch being formed. A promise given before is never withdrawn.
    """
    if request.promised:
        return VerdictKind.ADMITTED
    if not decision.admitted:
        gone = decision.constraint.kind is ConstraintKind.HOPELESS or mode is VerdictMode.FIRM
        return VerdictKind.DECLINED if gone else VerdictKind.PENDING
    match mode:
        case VerdictMode.FIRM:
            return VerdictKind.ADMITTED
        case VerdictMode.EARLY:
            cheap = request.remaining_tokens <= early_prompt_tokens
            return VerdictKind.ADMITTED if cheap or starting or request.started else VerdictKind.PENDING
        case VerdictMode.LATE:
            return VerdictKind.PENDING


def displaces(decisions: Iterable[Decision], candidate_ids: Set[str]) -> bool:
    """Whether a plan leaves out a pending request that it might have held without the candidates.

    The engine may promise that request before the candidates reach it, and what is left then is not enough for both.
    So nothing is promised early at its cost: the engine, which sees them all, decides.
    """
    return any(
        not decision.admitted and decision.constraint.kind is not ConstraintKind.HOPELESS
        for decision in decisions
        if decision.id not in candidate_ids
    )


def verdict_at_first_token(request: Prefill, at_s: float) -> VerdictKind:
    """The last word on a request whose first token is out at `at_s`: a promise for the rest where it was in time."""
    return VerdictKind.ADMITTED if request.promised or at_s <= request.deadline_s else VerdictKind.DECLINED
