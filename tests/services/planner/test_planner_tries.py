"""Who is hopeless only on a long way to the engine: it decides, and after a bad moment for a few at a time."""

from collections.abc import Sequence

import pytest

from protos import types_pb2
from services.common.clock import Clock
from services.core.admission import Policy
from services.core.lengths import LengthForecaster
from services.core.slo import Tier
from services.core.view import PlanSettings
from services.planner.candidates import parse_candidate
from services.planner.ledger import Ledger
from services.planner.promises import Planning, Promises
from services.planner.state import parse_state
from tests.services.planner.planner_messages import a_candidate, a_request, a_state

TIERS = (Tier("tight", 0.05), Tier("loose", 0.1))
DECLINED, PENDING = types_pb2.VERDICT_KIND_BEST_EFFORT, types_pb2.VERDICT_KIND_PENDING
ADMITTED = types_pb2.VERDICT_KIND_ADMITTED
EARLY, FIRM = types_pb2.VERDICT_MODE_EARLY, types_pb2.VERDICT_MODE_FIRM


class SlowReplica:
    """A replica that the last requests took so many seconds to reach. Time stands still."""

    def __init__(self, transits_s: Sequence[float] = (0.4,) * 4, *, busy: bool = False) -> None:
        self.now_s = 1000.0
        self.clock, self._lengths = Clock(lambda: self.now_s), LengthForecaster()
        self.ledger = Ledger("gpu-0", self.clock)
        now_us = self.clock.now_us()
        running = [a_request(now_us, "running")] if busy else []
        self.ledger.apply(parse_state(a_state(now_us, requests=running), tiers=TIERS, clock=self.clock))
        self._promises = Promises(self.ledger, self.clock, Planning(TIERS, Policy.MH, PlanSettings(), ()))
        for transit_s in transits_s:
            self.ledger.transit.observe(self.now_s, transit_s)

    def asked(self, name: str, ttft_ms: float = 200.0, **fields: object) -> types_pb2.Verdict:
        wire = a_candidate(self.clock.now_us(), name, ttft_ms=ttft_ms, **{"verdict_mode": EARLY, **fields})
        candidate = parse_candidate(wire, "candidate", tiers=TIERS, clock=self.clock, lengths=self._lengths)
        return self._promises.decide([candidate])[candidate.key].verdict


def test_a_few_wait_for_the_engine_to_see_and_the_rest_is_declined() -> None:
    replica = SlowReplica()
    verdicts = [replica.asked(f"r{n}") for n in range(6)]
    assert [verdict.kind for verdict in verdicts] == [PENDING] * 4 + [DECLINED] * 2
    assert {verdict.constraint.kind for verdict in verdicts} == {types_pb2.CONSTRAINT_KIND_HOPELESS}


def test_who_is_declined_is_told_when_the_same_would_fit_with_the_usual_way() -> None:
    replica = SlowReplica()
    verdict = [replica.asked(f"r{n}") for n in range(5)][-1]
    assert verdict.retry_after_ms == 1  # the engine is idle: at once


def test_who_would_be_late_on_the_usual_way_too_is_declined_at_once() -> None:
    verdict = SlowReplica().asked("r", ttft_ms=50.0, prompt_tokens=4000)
    assert (verdict.kind, verdict.retry_after_ms) == (DECLINED, 0)  # never


def test_a_firm_verdict_waits_for_nothing_but_the_bad_moment_is_forgotten_soon() -> None:
    replica = SlowReplica()
    assert replica.asked("r0", verdict_mode=FIRM).kind == DECLINED
    replica.now_s += 5.0
    assert replica.asked("r1", verdict_mode=FIRM).kind == ADMITTED


def test_where_the_way_takes_long_now_and_then_the_engine_decides_about_everybody() -> None:
    replica = SlowReplica([0.005] * 20 + [0.4, 0.4])
    verdicts = [replica.asked(f"r{n}") for n in range(6)]
    assert [verdict.kind for verdict in verdicts] == [PENDING] * 6
    assert replica.asked("firm", verdict_mode=FIRM).kind == DECLINED


def test_of_so_many_that_are_on_their_way_undecided_more_are_no_use() -> None:
    replica = SlowReplica([0.005] * 20 + [0.4, 0.4])
    verdicts = [replica.asked(f"r{n}") for n in range(80)]
    assert [verdict.kind for verdict in verdicts].count(PENDING) == 64


def test_the_usual_way_is_never_thought_longer_than_a_long_one() -> None:
    """The first requests of a new stack took long, then one did not."""
    replica = SlowReplica([0.4, 0.01])
    assert replica.ledger.transit.median_s(replica.now_s) <= replica.ledger.transit.seconds(replica.now_s)
    verdict = replica.asked("r", ttft_ms=120.0)
    assert verdict.kind == ADMITTED


def test_a_promise_on_arrival_has_a_batch_to_spare_and_the_engine_decides_about_tighter_ones() -> None:
    verdicts = [
        [
            SlowReplica([0.010] * 20, busy=True).asked("r", ttft_ms=ttft_ms, prompt_tokens=100, verdict_mode=mode)
            for ttft_ms in range(20, 140)
        ]
        for mode in (EARLY, FIRM)
    ]
    early, firm = ([verdict.kind for verdict in each] for each in verdicts)
    tight = [verdict.constraint for verdict in verdicts[0] if verdict.kind == PENDING and verdict.constraint.kind]
    assert {constraint.kind for constraint in tight} >= {types_pb2.CONSTRAINT_KIND_BATCH_AHEAD}
    assert all(constraint.needed > constraint.available for constraint in tight)
    assert list(dict.fromkeys(early)) == [DECLINED, PENDING, ADMITTED]
    assert list(dict.fromkeys(firm)) == [DECLINED, ADMITTED]
    assert early.count(ADMITTED) == pytest.approx(firm.count(ADMITTED) - 20, abs=2)  # a batch of decoding takes 20 ms


@pytest.mark.parametrize(("ttft_ms", "counts"), [(2000.0, True), (30.0, False)])
def test_the_wait_of_best_effort_in_its_queue_is_no_way_to_the_engine(ttft_ms: float, counts: bool) -> None:
    replica = SlowReplica([])
    assert (replica.asked("r", ttft_ms=ttft_ms).kind == ADMITTED) == counts  # the other one goes into the queue
    replica.now_s += 5.0
    now_us = replica.clock.now_us()
    arrived = a_request(now_us, "r", tier="loose" if counts else "best-effort", promised=counts, accepted_at_us=now_us)
    replica.ledger.apply(parse_state(a_state(now_us, 2, requests=[arrived]), tiers=TIERS, clock=replica.clock))
    assert replica.ledger.transit.seconds(replica.now_s) == pytest.approx(5.0 if counts else 0.02)
