import asyncio

import pytest

from protos import types_pb2
from services.common.clock import Clock
from services.common.errors import SloServeError
from services.core.admission import Policy
from services.core.lengths import LengthForecaster
from services.core.slo import Tier
from services.core.view import PlanSettings
from services.planner.candidates import Candidate, parse_candidate
from services.planner.decide import Decided, Decider
from services.planner.ledger import Ledger
from services.planner.promises import Planning, PlanRun, Promises
from services.planner.state import parse_state
from tests.services.planner.planner_messages import a_candidate, a_state

TIERS = (Tier("tight", 0.05), Tier("loose", 0.1))


class DecidingReplica:
    """An idle replica whose deciding is watched; `during_run` is called while a plan runs."""

    def __init__(self) -> None:
        self.clock, self.lengths = Clock(), LengthForecaster()
        self.ledger = Ledger("gpu-0", self.clock)
        state = a_state(self.clock.now_us())
        self.ledger.apply(parse_state(state, tiers=TIERS, clock=self.clock))
        self.runs: list[PlanRun] = []
        self.during_run = lambda: None
        planning = Planning(TIERS, Policy.GREEDY, PlanSettings(), (self._on_run,))
        self.decider = Decider(Promises(self.ledger, self.clock, planning))

    def _on_run(self, run: PlanRun) -> None:
        self.runs.append(run)
        self.during_run()

    def candidate(self, request_id: str, attempt: int = 1) -> Candidate:
        wire = a_candidate(self.clock.now_us(), request_id, attempt=attempt)
        return parse_candidate(wire, "candidate", tiers=TIERS, clock=self.clock, lengths=self.lengths)

    async def admit(self, request_id: str, attempt: int = 1) -> Decided:
        return await self.decider.admit([self.candidate(request_id, attempt)])


async def test_calls_that_queue_while_a_plan_runs_share_the_next_one() -> None:
    replica = DecidingReplica()
    late: list[asyncio.Task[Decided]] = []

    def three_more_arrive() -> None:
        if not late:
            late.extend(asyncio.ensure_future(replica.admit(f"late-{n}")) for n in range(3))

    replica.during_run = three_more_arrive
    first = await replica.admit("first")
    answers = await asyncio.gather(*late)
    assert [[p.id for p in run.candidates] for run in replica.runs] == [["first"], ["late-0", "late-1", "late-2"]]
    assert [first.decided_together, *(answer.decided_together for answer in answers)] == [1, 3, 3, 3]
    assert {len(answer.verdicts) for answer in answers} == {1}


async def test_the_same_attempt_asked_twice_at_once_is_decided_once() -> None:
    replica = DecidingReplica()
    one, two = await asyncio.gather(replica.admit("r1"), replica.admit("r1"))
    assert one.verdicts == two.verdicts
    assert [len(run.candidates) for run in replica.runs] == [1]


async def test_a_call_that_was_given_up_reserves_nothing() -> None:
    replica = DecidingReplica()
    given_up = asyncio.ensure_future(replica.admit("r1"))
    kept = asyncio.ensure_future(replica.admit("r2"))
    await asyncio.sleep(0)
    given_up.cancel()
    await kept
    assert replica.ledger.reservation(("r1", 1)) is None
    assert replica.ledger.reservation(("r2", 1)) is not None


async def test_an_attempt_older_than_one_that_waits_is_refused_alone() -> None:
    replica = DecidingReplica()
    newer = asyncio.ensure_future(replica.admit("r1", attempt=2))
    await asyncio.sleep(0)
    with pytest.raises(SloServeError, match="stale"):
        await replica.admit("r1", attempt=1)
    assert (await newer).verdicts[0].verdict.kind == types_pb2.VERDICT_KIND_ADMITTED


async def test_an_error_while_planning_reaches_every_caller() -> None:
    replica = DecidingReplica()

    def fail() -> None:
        raise RuntimeError("the disk of the decision log is gone")

    replica.during_run = fail
    calls = [asyncio.ensure_future(replica.admit(name)) for name in ("r1", "r2")]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [RuntimeError, RuntimeError]
