"""Pending requests in vLLM's real scheduler, on a virtual clock, with one batch in flight and with two."""

import math
import random

import pytest

from services.core.constraint import ConstraintKind
from services.core.slo import VerdictMode
from tests.services.worker.driven_scheduler import DrivenScheduler, Sent, driven

DEPTHS = pytest.mark.parametrize("depth", [1, 2])
LONG = 3000  # tokens: beyond what is promised before its prefill starts


def is_promised(replica: DrivenScheduler, request_id: str) -> bool:
    return bool(replica.scheduler._tracked[request_id].promised)


def burst(replica: DrivenScheduler, mode: VerdictMode, count: int = 12, ttft_s: float = 1.0) -> list[Sent]:
    """More prefill than its deadlines allow: about three seconds of it on this preset."""
    return [replica.send(f"p{index}", 4000, 6, ttft_s=ttft_s, pending=mode) for index in range(count)]


@DEPTHS
def test_a_long_prompt_is_promised_when_its_prefill_starts(depth: int) -> None:
    with driven(depth=depth) as replica:
        replica.send("p", LONG, 5, ttft_s=2.0, pending=VerdictMode.EARLY)
        assert not is_promised(replica, "p")
        replica.step()
        assert is_promised(replica, "p")
        entry = replica.decided(1)["p"]
        assert entry.admitted
        assert 0 < entry.predicted_ttft_s <= 2.0
        assert entry.constraint.kind is ConstraintKind.NONE


@DEPTHS
def test_a_cheap_prompt_is_promised_as_soon_as_a_plan_holds_it(depth: int) -> None:
    with driven(depth=depth) as replica:
        replica.send("ahead", LONG, 5, ttft_s=1.0)
        replica.send("cheap", 500, 5, ttft_s=3.0, pending=VerdictMode.EARLY)
        replica.step()
        assert not replica.sent["cheap"].times_s
        assert is_promised(replica, "cheap")


@DEPTHS
@pytest.mark.parametrize("mode", [VerdictMode.EARLY, VerdictMode.LATE])
def test_what_is_promised_of_a_burst_is_kept_and_the_rest_is_told_why(depth: int, mode: VerdictMode) -> None:
    with driven(depth=depth) as replica:
        sent = burst(replica, mode)
        replica.run()
        decided = replica.decided(len(sent))
        admitted = [name for name, entry in decided.items() if entry.admitted]
        declined = [name for name, entry in decided.items() if not entry.admitted]
        assert 2 <= len(admitted) < len(sent)
        assert [name for name in admitted if replica.sent[name].missed] == []
        assert {decided[name].constraint.kind for name in declined} == {ConstraintKind.HOPELESS}
        assert all(0 <= decided[name].retry_after_s < 5 for name in declined)
        assert all(len(one.tokens) == 6 for one in sent), "best effort is served all the same"


def test_a_late_verdict_falls_with_the_first_token() -> None:
    with driven() as replica:
        sent = replica.send("p", 20_000, 5, ttft_s=5.0, pending=VerdictMode.LATE)
        steps = 0
        while not sent.times_s:
            assert not is_promised(replica, "p")
            replica.step()
            steps += 1
        assert steps > 1
        assert is_promised(replica, "p")
        entry = replica.decided(1)["p"]
        assert entry.admitted
        assert entry.predicted_ttft_s == pytest.approx(sent.times_s[0] - sent.terms.arrival_s, abs=0.01)


def test_a_late_prefill_gives_way_after_it_has_started() -> None:
    with driven() as replica:
        large = replica.send("large", 30_000, 5, ttft_s=2.6, pending=VerdictMode.LATE)
        replica.step()
        assert replica.scheduler._tracked["large"].started
        small = [replica.send(f"s{i}", 4000, 5, ttft_s=1.2, pending=VerdictMode.LATE) for i in range(4)]
        replica.run()
        decided = replica.decided(5)
        assert [decided[f"s{i}"].admitted for i in range(4)] == [True] * 4
        assert not decided["large"].admitted
        assert [one.missed for one in small] == [""] * 4
        assert len(large.tokens) == 5


@DEPTHS
def test_promises_already_made_come_before_pending_requests(depth: int) -> None:
    with driven(depth=depth) as replica:
        promised = [replica.send(f"held{i}", 3500, 5, ttft_s=0.9) for i in range(3)]
        pending = burst(replica, VerdictMode.EARLY, count=6, ttft_s=0.9)
        replica.run()
        assert [one.missed for one in promised] == [""] * 3
        decided = replica.decided(len(pending))
        assert not all(entry.admitted for entry in decided.values())


def test_a_pending_request_that_is_aborted_is_forgotten() -> None:
    with driven() as replica:
        burst(replica, VerdictMode.EARLY, count=6)
        replica.step()
        waiting = [name for name in replica.sent if not is_promised(replica, name)]
        assert waiting
        for name in list(replica.sent):
            replica.abort(name)
        assert len(replica.scheduler._hook.pending) == 0
        assert not replica.scheduler._hook.pending.set_aside


def test_a_promise_that_comes_from_outside_settles_a_pending_request() -> None:
    with driven() as replica:
        replica.send("ahead", LONG, 50, ttft_s=1.0)
        replica.send("p", 20_000, 5, ttft_s=20.0, pending=VerdictMode.LATE)
        hook = replica.scheduler._hook
        hook.promote(replica.scheduler._tracked["p"], "loose", replica.now_s)
        assert len(hook.pending) == 0
        replica.run()
        assert replica.sent["p"].missed == ""


@DEPTHS
def test_verdicts_are_kept_under_random_load_beside_best_effort(depth: int) -> None:
    rng = random.Random(3)
    with driven(depth=depth) as replica:
        due_s, pending = replica.now_s, 0
        for index in range(120):
            due_s += rng.expovariate(3.0)
            replica.run(until_s=due_s)
            replica.now_s = max(replica.now_s, due_s)
            mode = rng.choice([None, VerdictMode.EARLY, VerdictMode.LATE])
            pending += mode is not None
            prompt, output = rng.randint(200, 6000), rng.randint(1, 60)
            replica.send(f"r{index}", prompt, output, ttft_s=1.5, promised=False, pending=mode)
        replica.run()
        decided = replica.decided(pending)
        admitted = [name for name, entry in decided.items() if entry.admitted]
        broken = [name for name in admitted if replica.sent[name].missed]
        assert len(admitted) > 30
        assert len(broken) <= math.ceil(len(admitted) / 50), broken
        assert all(len(one.tokens) == one.request.max_tokens for one in replica.sent.values())
