"""Speculation length per tier: how many tokens each step verifies for a decoder.

With acceptance rate a, a step that verifies n tokens is expected to yield

    yield(n) = (1 - a**n) / (1 - a)

of them (Leviathan et al., Fast Inference from Transformers via Speculative Decoding, eq. 1) and needs n - 1 sequential
draft steps; n = 1 is plain decoding. A tier keeps its pace while period <= yield(n) * TPOT, so longer drafts allow
longer batches, which carry more prefill; but each verified token takes the place of a prefill token. `choose_lengths`
picks the lengths that maximise prefill tokens per second.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from services.core.perf_model import BatchShape, PerfModel
from services.core.roofline import MAX_TOKENS

__all__ = [
    "MAX_VERIFY_TOKENS",
    "PRIOR_ACCEPTANCE",
    "AcceptanceEstimator",
    "LengthChoice",
    "choose_lengths",
    "expected_tokens",
    "fastest_length",
]

MAX_VERIFY_TOKENS = 10
"""The most tokens that a step may verify for one request, whatever the engine."""

PRIOR_ACCEPTANCE = 0.6
"""The acceptance rate reckoned with for an application of which nothing was seen."""


def expected_tokens(verify_tokens: int, acceptance: float) -> float:
    """Tokens a step is expected to yield when it verifies `verify_tokens` of them; `acceptance` is 0 to 1."""
    if acceptance >= 1.0:
        return float(verify_tokens)
    return (1.0 - acceptance**verify_tokens) / (1.0 - acceptance)


@dataclass(frozen=True, slots=True)
class LengthChoice:
    """Verified tokens per tier, the batch period they allow, and the prefill rate that leaves, tokens/s.

    A negative rate means that not even the decoders fit.
    """

    verify_tokens: tuple[int, ...]
    period_s: float
    prefill_tokens_per_s: float


def choose_lengths(
    model: PerfModel,
    decoders: Sequence[int],
    tpots_s: Sequence[float],
    acceptance: Sequence[float],
    *,
    cap_s: float,
    context_tokens: int = 0,
    max_verify_tokens: int = MAX_VERIFY_TOKENS,
    max_batch_tokens: int = MAX_TOKENS,
) -> LengthChoice:
    """The lengths with the highest prefill rate for `decoders[t]` running requests per tier.

    A batch holds at most `max_batch_tokens`, verified tokens included.

    Only periods at which some populated tier is exactly on pace (or the cap) can be optimal: between two of them a
    longer batch costs no extra draft token. For each, every tier takes the shortest length that keeps its pace.
    """
    populated = [t for t, count in enumerate(decoders) if count > 0]
    periods = {cap_s}
    for t in populated:
        paces = (expected_tokens(n, acceptance[t]) * tpots_s[t] for n in range(1, max_verify_tokens + 1))
        periods.update(min(pace, cap_s) for pace in paces)
    choices = (
        _at_period(model, decoders, tpots_s, acceptance, period, context_tokens, max_verify_tokens, max_batch_tokens)
        for period in sorted(periods)
    )
    return max((c for c in choices if c is not None), key=lambda c: c.prefill_tokens_per_s)


def fastest_length(
    model: PerfModel,
    decoders: Sequence[int],
    tpots_s: Sequence[float],
    acceptance: Sequence[float],
    *,
    context_tokens: int = 0,
    max_verify_tokens: int = MAX_VERIFY_TOKENS,
    max_batch_tokens: int = MAX_TOKENS,
) -> int:
    """The length for all at which `decoders[t]` requests per tier alone produce most tokens per second.

    For batches without prefill. Only lengths count at which every tier keeps its pace; 0 where there is none.
    """
    populated = [t for t, count in enumerate(decoders) if count > 0]
    requests = sum(decoders)
    fastest, best = 0, 0.0
    for length in range(1, max_verify_tokens + 1):
        seconds = model.seconds(BatchShape(requests * length, context_tokens, requests, length - 1))
        yields = {t: expected_tokens(length, acceptance[t]) for t in populated}
        if requests * length > max_batch_tokens or any(seconds > yields[t] * tpots_s[t] for t in populated):
            continue
        rate = sum(decoders[t] * yields[t] for t in populated) / seconds
        if rate > best:
            fastest, best = length, rate
    return fastest


def _at_period(
    model: PerfModel,
    decoders: Sequence[int],
    tpots_s: Sequence[float],
    acceptance: Sequence[float],
    period_s: float,
    context_tokens: int,
    max_verify_tokens: int,
    max_batch_tokens: int,
) -> LengthChoice | None:
    lengths: list[int] = []
    for t, count in enumerate(decoders):
        length = 1
        while count > 0 and expected_tokens(length, acceptance[t]) * tpots_s[t] < period_s - 1e-12:
            length += 1
            if length > max_verify_tokens:
                return None
        lengths.append(length)
    tokens = sum(count * length for count, length in zip(decoders, lengths, strict=True))
    requests = sum(decoders)
    draft_steps = max((n - 1 for n, count in zip(lengths, decoders, strict=True) if count > 0), default=0)
    room = min(model.tokens_within(period_s, context_tokens, requests + 1, draft_steps), max_batch_tokens) - tokens
    if room < 0 and tokens <= max_batch_tokens:
        alone_s = model.seconds(BatchShape(tokens, context_tokens, requests, draft_steps))
        room = 0 if alone_s <= period_s + 1e-9 else room
    return LengthChoice(tuple(lengths), period_s, room / period_s)


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
