import pytest

from protos import types_pb2
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.core.lengths import LengthForecaster
from services.core.slo import Tier
from services.core.view import check_view
from services.planner.audit import Cause, cause_of
from services.planner.candidates import parse_candidate
from services.planner.history import Said
from services.planner.ledger import Applied, Ledger
from services.planner.state import parse_state
from tests.services.planner.planner_messages import a_candidate, a_request, a_state

TIERS = (Tier("tight", 0.05), Tier("loose", 0.1))


class SteppedReplica:
    """A ledger on a clock that moves only when told."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.clock = Clock(monotonic_s=lambda: self.seconds, wall_s=lambda: 1_700_000_000.0)
        self.lengths = LengthForecaster()
        self.ledger = Ledger("gpu-0", self.clock, reservation_s=2.0)

    def say(self, seq: int = 1, **fields: object) -> Applied:
        state = a_state(self.clock.now_us(), seq, **fields)
        return self.ledger.apply(parse_state(state, tiers=TIERS, clock=self.clock))

    def request(self, request_id: str, **fields: object):
        return a_request(self.clock.now_us(), request_id, **fields)

    def reserve(self, request_id: str, attempt: int = 1) -> None:
        wire = a_candidate(self.clock.now_us(), request_id, attempt=attempt)
        candidate = parse_candidate(wire, "candidate", tiers=TIERS, clock=self.clock, lengths=self.lengths)
        verdict = types_pb2.Verdict(kind=types_pb2.VERDICT_KIND_ADMITTED)
        self.ledger.reserve(attempt, candidate.prefill, verdict)
        self.ledger.history.remember(request_id, Said(attempt, verdict, candidate.prefill.deadline_s))


@pytest.fixture
def replica() -> SteppedReplica:
    stepped = SteppedReplica()
    stepped.say()
    return stepped


def planned_ids(replica: SteppedReplica) -> list[str]:
    return [prefill.id for prefill in replica.ledger.view().prefills]


def test_a_reservation_is_planned_as_promised_for_two_seconds(replica) -> None:
    replica.reserve("r1")
    assert [(p.id, p.promised) for p in replica.ledger.view().prefills] == [("r1", True)]
    replica.seconds += 1.99
    assert planned_ids(replica) == ["r1"]
    replica.seconds += 0.01
    assert planned_ids(replica) == []
    assert replica.ledger.commit(("r1", 1)) is False


def test_a_committed_one_lasts_until_the_engine_reports_it(replica) -> None:
    replica.reserve("r1")
    assert replica.ledger.commit(("r1", 1))
    replica.seconds += 3
    assert planned_ids(replica) == ["r1"]
    replica.say(2, full=False, requests=[replica.request("r1", output_tokens=0, computed_tokens=0, promised=True)])
    assert planned_ids(replica) == ["r1"]
    assert replica.ledger.reservation(("r1", 1)) is None
    assert replica.ledger.holds(("r1", 1))
    assert replica.ledger.commit(("r1", 1))


def test_a_committed_one_that_never_shows_up_is_given_up_after_its_deadline(replica) -> None:
    replica.reserve("r1")
    replica.ledger.commit(("r1", 1))
    replica.seconds += 6.1  # its first token was due after one second
    assert planned_ids(replica) == []


def test_a_request_that_came_and_went_between_two_states_ends_its_reservation(replica) -> None:
    replica.reserve("r1")
    replica.say(2, full=False, removed_ids=["r1"])
    assert planned_ids(replica) == []


def test_the_end_of_an_older_attempt_does_not_end_the_newer_ones_reservation(replica) -> None:
    replica.say(2, full=False, requests=[replica.request("r1")])
    replica.reserve("r1", attempt=2)
    replica.say(3, full=False, removed_ids=["r1"])
    assert planned_ids(replica) == ["r1"]
    assert replica.ledger.attempt("r1") == 2


def test_a_newer_claim_is_planned_in_place_of_what_the_engine_still_holds(replica) -> None:
    replica.say(2, full=False, requests=[replica.request("r1"), replica.request("r2")])
    replica.reserve("r1", attempt=2)
    view = replica.ledger.view()
    assert [decoder.id for decoder in view.decoders] == ["r2"]
    assert [prefill.id for prefill in view.prefills] == ["r1"]
    assert len(replica.ledger.view(asked_ids=frozenset({"r2"})).decoders) == 0
    check_view(view)


def test_deltas_apply_only_on_top_of_the_one_before(replica) -> None:
    assert replica.say(2, full=False, requests=[replica.request("r1")]) is Applied.TAKEN
    assert replica.say(4, full=False, requests=[replica.request("r2")]) is Applied.GAP
    assert set(replica.ledger.entries) == {"r1"}
    with pytest.raises(SloServeError) as refused:
        replica.say(2, full=False)
    assert refused.value.reason is Reason.STATE_INVALID
    assert replica.say(9, requests=[replica.request("r3")]) is Applied.TAKEN
    assert set(replica.ledger.entries) == {"r3"}


def test_a_new_stream_begins_with_a_full_state_and_may_count_anew(replica) -> None:
    replica.ledger.disconnect()
    assert not replica.ledger.ready
    replica.ledger.connect()
    assert replica.say(1, full=False) is Applied.GAP
    assert not replica.ledger.ready
    assert replica.say(1) is Applied.TAKEN
    assert replica.ledger.ready


def test_decoders_keep_their_slack_between_reports_but_not_for_ever(replica) -> None:
    replica.say(2, full=False, requests=[replica.request("r1")])
    slack_s = replica.ledger.view().decoders[0].next_deadline_s - replica.seconds
    replica.seconds += 0.2
    assert replica.ledger.view().decoders[0].next_deadline_s - replica.seconds == pytest.approx(slack_s)
    replica.seconds += 10
    assert replica.ledger.view().decoders[0].next_deadline_s < replica.seconds - 9


def test_the_batch_in_flight_delays_the_plan(replica) -> None:
    free_us = replica.clock.now_us() + 30_000
    replica.say(2, full=False, requests=[replica.request("r1")], engine_free_at_us=free_us)
    view = replica.ledger.view()
    assert view.start_s == pytest.approx(replica.seconds + 0.03)
    assert view.decoders[0].next_deadline_s == pytest.approx(replica.seconds + 0.1)
    replica.seconds += 0.05  # that batch is over, and the next report has not come yet
    assert replica.ledger.view().decoders[0].next_deadline_s == pytest.approx(replica.seconds + 0.07)


def test_before_the_first_state_there_is_nothing_to_plan() -> None:
    with pytest.raises(SloServeError, match="not reported"):
        SteppedReplica().ledger.view()


def test_causes_tell_a_lapsed_reservation_from_a_slow_queue_and_a_slow_engine(replica) -> None:
    for name in ("lapsed", "queued", "engine"):
        replica.reserve(name)
    for name in ("queued", "engine"):
        replica.ledger.commit((name, 1))
    replica.say(2, full=False, requests=[replica.request("engine")])
    replica.seconds += 2.5  # past the reservation, and past every first-token deadline
    replica.say(3, full=False, requests=[replica.request("queued"), replica.request("lapsed")])
    history = replica.ledger.history
    causes = {name: cause_of("ttft", history.get(name)) for name in ("lapsed", "queued", "engine", "stranger")}
    assert causes == {
        "lapsed": Cause.LAPSED,
        "queued": Cause.QUEUE,
        "engine": Cause.ENGINE,
        "stranger": Cause.UNPLANNED,
    }


def test_only_the_last_few_thousand_verdicts_are_remembered(replica) -> None:
    for number in range(5000):
        replica.ledger.history.remember(f"r{number}", Said(1, types_pb2.Verdict(), 0.0))
    assert replica.ledger.history.get("r0") is None
    assert replica.ledger.history.get("r4999") is not None
