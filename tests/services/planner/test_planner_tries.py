"""After a bad moment: who is hopeless only because the way to the engine took long lately is tried, a few at a time."""

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
from tests.services.planner.planner_messages import a_candidate, a_state

TIERS = (Tier("tight", 0.05), Tier("loose", 0.1))
DECLINED, PENDING = types_pb2.VERDICT_KIND_BEST_EFFORT, types_pb2.VERDICT_KIND_PENDING
EARLY, FIRM = types_pb2.VERDICT_MODE_EARLY, types_pb2.VERDICT_MODE_FIRM


class SlowReplica:
    """An idle replica that the last requests took 400 ms to reach. Time stands still."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.clock, self._lengths = Clock(lambda: self.now_s), LengthForecaster()
        self.ledger = Ledger("gpu-0", self.clock)
        self.ledger.apply(parse_state(a_state(self.clock.now_us()), tiers=TIERS, clock=self.clock))
        self._promises = Promises(self.ledger, self.clock, Planning(TIERS, Policy.MH, PlanSettings(), ()))
        for _ in range(4):
            self.ledger.transit.observe(self.now_s, 0.4)

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
    assert replica.asked("r1", verdict_mode=FIRM).kind == types_pb2.VERDICT_KIND_ADMITTED
