"""Speculation: what draft tokens are expected to yield, and how many of an application's are accepted.

With acceptance rate a, a step that verifies n tokens is expected to yield

    yield(n) = (1 - a**n) / (1 - a)

of them (Leviathan et al., Fast Inference from Transformers via Speculative Decoding, eq. 1) and needs n - 1 sequential
draft steps; n = 1 is plain decoding. How many tokens each tier verifies is chosen in `services.core.draft_lengths`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["MAX_VERIFY_TOKENS", "PRIOR_ACCEPTANCE", "AcceptanceEstimator", "Drafts", "expected_tokens"]

MAX_VERIFY_TOKENS = 10
"""The most tokens that a step may verify for one request, whatever the engine."""

PRIOR_ACCEPTANCE = 0.6
"""The acceptance rate reckoned with for an application of which nothing was seen."""


def expected_tokens(verify_tokens: int, acceptance: float) -> float:
    """Tokens a step is expected to yield when it verifies `verify_tokens` of them; `acceptance` is 0 to 1."""
    if acceptance >= 1.0:
        return float(verify_tokens)
    return (1.0 - math.pow(acceptance, float(verify_tokens))) / (1.0 - acceptance)  # as the kernels compute it too


@dataclass(frozen=True, slots=True)
class Drafts:
    """What an engine drafts, and what that is worth.

    `max_verify_tokens` is the most tokens that a step verifies for one request; 1: it drafts nothing. `acceptance` is
    the estimated acceptance rate of each application seen, 0 to 1.
    """

    max_verify_tokens: int = 1
    acceptance: Mapping[str, float] = field(default_factory=dict)

    @property
    def enabled(self) -> bool:
        """Whether the engine drafts tokens at all."""
        return self.max_verify_tokens > 1

    def rate(self, application: str) -> float:
        """Acceptance rate of an application; the prior for one never seen."""
        return self.acceptance.get(application, PRIOR_ACCEPTANCE)


class AcceptanceEstimator:
    """On-line acceptance rate of draft tokens per application.

    Of `drafted` tokens, `accepted` were kept and, unless all were, the next one was refused: a run of a geometric
    variable. The estimate is the exponentially weighted share of accepted among tokens that were judged.
    """

    def __init__(self, *, prior: float = PRIOR_ACCEPTANCE, memory_tokens: float = 500.0) -> None:
        self._prior = prior
        self._memory_tokens = memory_tokens
        self._judged: dict[str, tuple[float, float]] = {}

    def observe(self, application: str, drafted: int, accepted: int) -> None:
        """One step of one request."""
        self.observe_judged(application, min(drafted, accepted + 1), accepted)

    def observe_judged(self, application: str, judged: int, accepted: int) -> None:
        """Several steps at once: of `judged` tokens, `accepted` were kept."""
        if judged <= 0:
            return
        kept, total = self._judged.get(application, (self._prior, 1.0))
        keep = max(0.0, 1.0 - judged / self._memory_tokens)
        self._judged[application] = (kept * keep + accepted, total * keep + judged)

    @property
    def rates(self) -> dict[str, float]:
        """Estimated acceptance rate of every application seen, 0 to 1."""
        return {application: kept / total for application, (kept, total) in self._judged.items()}

    def rate(self, application: str) -> float:
        """Estimated acceptance rate, 0 to 1; the prior for an application never seen."""
        kept, total = self._judged.get(application, (self._prior, 1.0))
        return kept / total
