"""Best effort beside promises that would fill the replica for ever."""

import random

import pytest

from services.core.best_effort import longest_waiting
from services.core.slo import VerdictMode
from services.worker.link import ExpectPromises
from tests.services.worker.driven_scheduler import DrivenScheduler, Sent, driven

DEPTHS = pytest.mark.parametrize("depth", [1, 2])
LASTS_S = 30.0


def overload(replica: DrivenScheduler, seconds: float) -> list[Sent]:
    """Twice what the replica can promise, for so long."""
    rng = random.Random(3)
    until_s, due_s, sent = replica.now_s + seconds, replica.now_s, []
    while due_s < until_s:
        due_s += rng.expovariate(14.0)
        replica.run(until_s=due_s)
        replica.now_s = max(replica.now_s, due_s)
        prompt, output = rng.randint(400, 2500), rng.randint(20, 150)
        number = len(replica.sent)
        sent.append(replica.send(f"p{number}", prompt, output, ttft_s=1.5, pending=VerdictMode.EARLY))
    return sent


@DEPTHS
def test_it_starves_without_ageing_and_ends_with_it(depth: int) -> None:
    ended_s = []
    for patience_s in (1000.0, 4.0):
        with driven(depth=depth, patience_s=patience_s) as replica:
            load = overload(replica, 3.0)
            begin_s = replica.now_s
            old = [replica.send(f"old{i}", 4000, 60, ttft_s=0.5, promised=False, asked=True) for i in range(2)]
            load += overload(replica, LASTS_S)
            done = [sent.times_s[-1] - begin_s if sent.finish else float("inf") for sent in old]
            ended_s.append(done)
            replica.run()
            decided = replica.decided(len(load))
            kept = [sent for sent in load if decided[sent.terms.request_id].admitted]
            assert len(kept) > 100
            assert sum(bool(sent.missed) for sent in kept) <= len(kept) // 50
            assert all(len(sent.tokens) == 60 for sent in old)
    starved, aged = ended_s
    assert min(starved) > LASTS_S
    assert min(aged) < LASTS_S / 2
    assert max(aged) < LASTS_S


def test_the_oldest_past_its_patience_is_next() -> None:
    arrivals_s = {"a": 10.0, "b": 5.0, "c": 50.0}
    assert longest_waiting(arrivals_s, 36.0, 30.0) == "b"
    assert longest_waiting(arrivals_s, 35.0, 30.0) is None
    assert longest_waiting({}, 35.0, 30.0) is None


@DEPTHS
def test_an_aged_request_that_came_too_late_keeps_its_turn(depth: int) -> None:
    with driven(depth=depth, patience_s=2.0) as replica:
        load = overload(replica, 2.0)
        replica.send("old", 4000, 60, ttft_s=0.5, promised=False, asked=True)
        while not (old := replica.scheduler._tracked["old"]).aged:
            load += overload(replica, 0.2)
        assert old.promised
        replica.now_s += 30.0  # the device stood still: what was due is lost
        replica.step()
        assert replica.scheduler._tracked["old"] is old
        assert old.aged
        assert old.promised
        assert replica.now_s < old.due_s < replica.now_s + 10.0
        lost = [one for one in load if (tracked := replica.scheduler._tracked.get(one.terms.request_id)) is not None
                and not tracked.on_tier]  # fmt: skip
        assert lost  # which those were that had a client's promise
        replica.run()
        assert replica.scheduler._hook._promised == 0


@DEPTHS
def test_best_effort_keeps_its_batches_short_for_five_seconds_where_a_promise_is_wanted(depth: int) -> None:
    with driven(depth=depth, preset="opt-6.7b-a100", max_model_len=2048) as replica:
        for number in range(300):
            replica.send(f"be{number}", 1500, 2, promised=False)
        for _ in range(4):
            assert replica.step().total_num_scheduled_tokens > 4000
        replica.scheduler._obey(ExpectPromises(), replica.now_s)
        told_s = replica.now_s
        while replica.now_s < told_s + 4.5:
            batch = replica.step()
            assert replica.preset.model.zero_load_prefill_s(batch.total_num_scheduled_tokens) <= 0.041
        while replica.now_s < told_s + 6.0:
            batch = replica.step()
        assert batch.total_num_scheduled_tokens > 4000


@DEPTHS
def test_its_turn_comes_though_memory_is_promised_for_ever(depth: int) -> None:
    """Half of all memory for one request, while four others always hold most of it: no plan ever has both."""
    patience_s = 4.0
    with driven(depth=depth, patience_s=patience_s, kv_blocks=600, max_model_len=9000) as replica:
        rng, sent = random.Random(5), []

        def load_until(until_s: float) -> None:
            while replica.now_s < until_s:
                arrival_s = replica.now_s + rng.expovariate(8.0)
                replica.run(until_s=arrival_s)
                replica.now_s = max(replica.now_s, arrival_s)
                name = f"p{len(sent)}"
                sent.append(replica.send(name, 2000, 40, ttft_s=1.5, pending=VerdictMode.EARLY))

        load_until(replica.now_s + 3.0)
        begin_s = replica.now_s
        old = replica.send("old", 4000, 20, ttft_s=0.5, promised=False, asked=True)
        load_until(begin_s + 5 * patience_s)
        assert old.finish
        assert old.times_s[-1] - begin_s < 4 * patience_s
        replica.run()
        decided = replica.decided(len(sent))
        kept = [one for one in sent if decided[one.terms.request_id].admitted]
        assert len(kept) > 50
        assert not any(one.missed for one in kept)
