"""Planning a replica whose engine drafts tokens: what it accepts on each tier, and what that changes."""

from dataclasses import replace

import pytest

from protos import planner_pb2, types_pb2
from services.core.admission import Policy
from services.core.speculation import PRIOR_ACCEPTANCE, Drafts
from services.core.view import PlanSettings
from services.planner.candidates import Candidate, parse_candidate
from services.planner.promises import Planning, PlanRun, Promises
from tests.services.planner.planner_messages import a_candidate
from tests.services.planner.test_planner_ledger import TIERS, SteppedReplica

ADMITTED = types_pb2.VERDICT_KIND_ADMITTED


class PlannedReplica(SteppedReplica):
    """A replica with what decides about it; `runs` are the plans it made."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[PlanRun] = []
        planning = Planning(TIERS, Policy.MH, PlanSettings(), (self.runs.append,))
        self.promises = Promises(self.ledger, self.clock, planning)

    def candidate(self, name: str, *, tier: str = "tight", **fields: object) -> Candidate:
        tpot_ms = 50.0 if tier == "tight" else 100.0
        stage = types_pb2.Stage(
            kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=fields.get("ttft_ms"), tpot_ms=tpot_ms, max_tokens=64, tier=tier
        )
        wire = a_candidate(self.clock.now_us(), name, stages=[stage], **fields)
        return parse_candidate(wire, "candidate", tiers=TIERS, clock=self.clock, lengths=self.lengths)

    def decides(self, candidate: Candidate) -> bool:
        return self.promises.decide([candidate])[candidate.key].verdict.kind == ADMITTED


def drafts(most: int = 8, **acceptance: float) -> planner_pb2.Drafts:
    return planner_pb2.Drafts(max_verify_tokens=most, acceptance=acceptance)


def a_busy_replica(**fields: object) -> PlannedReplica:
    """Forty requests of `coder` decode on the tight tier, all of them just on pace."""
    replica = PlannedReplica()
    now_us = replica.clock.now_us()
    running = [
        replica.request(
            f"r{n}", tier="tight", tpot_ms=50.0, application="coder", next_deadline_us=now_us + 60_000,
            forecast_tokens=200,
        )
        for n in range(40)
    ]  # fmt: skip
    replica.say(requests=running, max_num_seqs=512, engine_free_at_us=now_us + 30_000, **fields)
    return replica


def the_long_prompt(replica: PlannedReplica) -> Candidate:
    return replica.candidate("long", ttft_ms=450.0, prompt_tokens=3200, application="coder")


def test_a_replica_that_accepts_its_drafts_is_promised_more() -> None:
    assert not a_busy_replica().decides(the_long_prompt(PlannedReplica()))
    assert a_busy_replica(drafts=drafts(coder=0.8)).decides(the_long_prompt(PlannedReplica()))
    assert not a_busy_replica(drafts=drafts(coder=0.0)).decides(the_long_prompt(PlannedReplica()))
    assert not a_busy_replica(drafts=drafts(most=1, coder=0.8)).decides(the_long_prompt(PlannedReplica()))


def test_no_plan_counts_on_more_tokens_than_the_engine_verifies() -> None:
    for most in (2, 3, 8):
        replica = a_busy_replica(drafts=drafts(most, coder=0.9))
        replica.decides(the_long_prompt(replica))
        [run] = replica.runs
        assert run.settings.max_verify_tokens == most
        assert run.decisions.verify_tokens[0] == min(most, 7)


def test_quotes_and_retry_delays_count_on_drafts_too() -> None:
    plain, drafting = a_busy_replica(), a_busy_replica(drafts=drafts(coder=0.8))
    quoted = [replica.promises.quote(the_long_prompt(replica))[0] for replica in (plain, drafting)]
    assert [found.fits for found in quoted] == [False, True]
    assert quoted[1].tightest_ttft_s < quoted[0].tightest_ttft_s
    longer = [
        replica.candidate("longer", ttft_ms=450.0, prompt_tokens=4500, application="coder")
        for replica in (plain, drafting)
    ]
    delays_ms = [
        replica.promises.decide([asked])[asked.key].verdict.retry_after_ms
        for replica, asked in zip((plain, drafting), longer, strict=True)
    ]
    assert 0 < delays_ms[1] < delays_ms[0]


def test_acceptance_is_the_mean_of_what_decodes_waits_and_is_asked_about_on_a_tier() -> None:
    replica = PlannedReplica()
    asked = [replica.candidate("a", application="coder"), replica.candidate("b", application="new")]
    replica.say(
        drafts=drafts(coder=0.8, chatbot=0.2),
        requests=[
            replica.request("r1", tier="tight", tpot_ms=50.0, application="chatbot"),
            replica.request("r2", tier="best-effort", application="chatbot"),
        ],
    )
    assert replica.promises.settings([]).acceptance == pytest.approx((0.2, PRIOR_ACCEPTANCE))
    prefills = [candidate.prefill for candidate in asked]
    on_tight, elsewhere = (0.2 + 0.8 + PRIOR_ACCEPTANCE) / 3, (0.8 + PRIOR_ACCEPTANCE) / 2
    assert replica.promises.settings(prefills).acceptance == pytest.approx((on_tight, elsewhere))
    verdict = types_pb2.Verdict(kind=ADMITTED)
    replica.ledger.reserve(1, replace(prefills[0], tier=1), verdict)  # planned where it waits, unless it is asked about
    replica.ledger.reserve(1, replace(prefills[0], id="r1", tier=1), verdict)  # a newer claim to what the engine holds
    assert replica.promises.settings([]).acceptance == pytest.approx((PRIOR_ACCEPTANCE, 0.8))
    assert replica.promises.settings(prefills[:1]).acceptance == pytest.approx((0.8, 0.8))


def test_drafts_stay_known_until_a_state_says_otherwise() -> None:
    replica = PlannedReplica()
    assert replica.ledger.drafts == Drafts()
    replica.say(drafts=drafts(4, coder=0.5))
    replica.say(2, full=False)
    assert replica.ledger.drafts == Drafts(4, {"coder": 0.5})
    replica.say(3, full=False, drafts=drafts(4, chatbot=1.0))
    assert replica.ledger.drafts == Drafts(4, {"chatbot": 1.0})
    replica.say(4)  # everything, from an engine that has none
    assert not replica.ledger.drafts.enabled


def test_the_batch_that_a_candidate_may_miss_is_the_one_with_drafts() -> None:
    def slip_s(replica: PlannedReplica) -> float:
        work = replica.request(
            "work", tier="loose", output_tokens=0, computed_tokens=0, prompt_tokens=4000,
            ttft_deadline_us=replica.clock.now_us() + 2_000_000,
        )  # fmt: skip
        replica.say(2, full=False, requests=[work], max_num_seqs=512, engine_free_at_us=replica.clock.now_us() + 1000)
        replica.decides(replica.candidate("c", ttft_ms=2000.0))
        return replica.seconds + 2.0 - replica.runs[-1].candidates[0].deadline_s

    plain_s, drafting_s = slip_s(a_busy_replica()), slip_s(a_busy_replica(drafts=drafts(coder=0.8)))
    assert plain_s == pytest.approx(0.06, abs=0.005)  # until the decoders are due
    assert drafting_s == pytest.approx(0.1, abs=0.005)  # their drafts allow the whole cap
