"""What a run is worth: the metrics of the evaluation, from the times a client sees.

- met: TTFT within its SLO and, for every stage, mean TPOT `(t_last - t_first) / (n - 1)` within its SLO.
- met_held: the same where the output path holds the first token until its deadline.
- met_smooth: TTFT as above and token n of every stage out by `t_first + (n - 1) * TPOT`.
- met_paper: promised (where the system promises); 5 % tolerance; checked every 20 tokens; the TPOT clock starts at the
  later of first token and TTFT deadline.

A job is met if all its calls are. Every job counts: refused, unfinished and never sent ones are misses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.simulator_call import LiveCall

__all__ = ["Outcome", "attainment_of", "met", "met_held", "met_paper", "met_smooth", "outcome_of", "quantile"]

_EPS_S = 1e-9
_TOLERANCE = 1.05
_EVERY = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """Metrics of one run. `applications` is attainment by application, `kept` the share of promises met.

    Both are as the client sees it: of a system that holds first tokens, by met_held.
    """

    jobs: int
    attainment: float
    held: float
    smooth: float
    paper: float
    calls: float
    applications: dict[str, float]
    promised: int
    kept: float
    ttft_p50_s: float
    ttft_p99_s: float


def outcome_of(calls: Sequence[LiveCall], jobs: int, *, promises: bool, holds: bool = False) -> Outcome:
    """Judge a run of `jobs` jobs.

    `promises`: the system makes some, so that met_paper asks for them. `holds`: its output path holds first tokens.
    """
    seen = met_held if holds else met
    by_job = _by_job(calls)
    applications = sorted({call.job.application for call in calls})
    promised = [call for call in calls if call.promised_s is not None]
    ttfts = sorted(call.token_s[0] - call.arrival_s for call in calls if call.token_s)
    return Outcome(
        jobs,
        attainment_of(by_job, jobs, met),
        attainment_of(by_job, jobs, met_held),
        attainment_of(by_job, jobs, met_smooth),
        attainment_of(by_job, jobs, lambda call: (call.promised_s is not None or not promises) and met_paper(call)),
        sum(map(met, calls)) / max(1, len(calls)),
        {name: _of_application(by_job, name, seen) for name in applications},
        len(promised),
        sum(map(seen, promised)) / len(promised) if promised else 1.0,
        quantile(ttfts, 0.5),
        quantile(ttfts, 0.99),
    )


def attainment_of(by_job: dict[int, list[LiveCall]], jobs: int, judge: Callable[[LiveCall], bool]) -> float:
    """Share of jobs all of whose calls were made and satisfy `judge`."""
    good = sum(len(calls) == len(calls[0].job.calls) and all(map(judge, calls)) for calls in by_job.values())
    return good / jobs


def met(call: LiveCall) -> bool:
    """Every stage met its SLO on average."""
    if not _first_in_time(call):
        return False
    return all(times[-1] - times[0] <= (len(times) - 1) * tpot_s + _EPS_S for times, tpot_s in _stages(call))


def met_held(call: LiveCall) -> bool:
    """As `met`, with nothing released before the first token's deadline."""
    if not _first_in_time(call):
        return False
    due_s = call.deadline_s
    return all(
        max(times[-1], due_s) - max(times[0], due_s) <= (len(times) - 1) * tpot_s + _EPS_S
        for times, tpot_s in _stages(call)
    )


def met_smooth(call: LiveCall) -> bool:
    """Every single token was in time."""
    if not _first_in_time(call):
        return False
    return all(
        time_s <= times[0] + number * tpot_s + _EPS_S
        for times, tpot_s in _stages(call)
        for number, time_s in enumerate(times)
    )


def met_paper(call: LiveCall) -> bool:
    """The published metric, without the question whether it was promised."""
    if not call.finished or call.token_s[0] - call.arrival_s > _TOLERANCE * call.call.ttft_s + _EPS_S:
        return False
    for times, tpot_s in _stages(call):
        clock_s = max(times[0], call.deadline_s)
        checked = {*range(_EVERY, len(times) + 1, _EVERY), len(times)}
        if any(times[n - 1] > clock_s + _TOLERANCE * (n - 1) * tpot_s + _EPS_S for n in checked):
            return False
    return True


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of an ascending sequence lies; 0 for none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _first_in_time(call: LiveCall) -> bool:
    return call.finished and call.token_s[0] <= call.deadline_s + _EPS_S


def _stages(call: LiveCall) -> Iterator[tuple[list[float], float]]:
    """Token times and TPOT of every stage."""
    begin = 0
    for stage in call.call.stages:
        yield call.token_s[begin : begin + stage.tokens], stage.tpot_s
        begin += stage.tokens


def _by_job(calls: Sequence[LiveCall]) -> dict[int, list[LiveCall]]:
    found: dict[int, list[LiveCall]] = {}
    for call in calls:
        found.setdefault(call.job.number, []).append(call)
    return found


def _of_application(by_job: dict[int, list[LiveCall]], name: str, judge: Callable[[LiveCall], bool]) -> float:
    own = {number: calls for number, calls in by_job.items() if calls[0].job.application == name}
    return attainment_of(own, len(own), judge)
