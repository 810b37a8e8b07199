"""The hook in vLLM's real scheduler, on a virtual clock, with one batch in flight and with two."""

import random

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from services.core.slo import BEST_EFFORT, StageKind
from services.worker.hash_tokens import HashTokens
from services.worker.request_terms import StageTerms
from services.worker.scheduler import AsyncSloScheduler, SloScheduler, SyncSloScheduler
from tests.services.worker.driven_scheduler import VOCABULARY, DrivenScheduler, Sent, driven

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


def expected_tokens(sent: Sent) -> list[int]:
    prompt = sent.request.num_prompt_tokens
    return HashTokens(VOCABULARY, (0, 1, 2)).continuation(sent.terms.digest, prompt, sent.request.max_tokens)


def poisson_load(replica: DrivenScheduler, rng: random.Random, *, requests: int, rate: float, promised: float) -> None:
    """Send requests at random times while the replica runs, then run to the end."""
    due_s = replica.now_s
    for index in range(requests):
        due_s += rng.expovariate(rate)
        replica.run(until_s=due_s)
        replica.now_s = max(replica.now_s, due_s)
        prompt, output = rng.randint(20, 800), rng.randint(1, 120)
        replica.send(f"r{index}", prompt, output, ttft_s=1.5, tpot_s=0.1, promised=rng.random() < promised)
    replica.run()


@DEPTHS
def test_promised_deadlines_are_kept_beside_best_effort(depth: int) -> None:
    with driven(depth=depth) as replica:
        poisson_load(replica, random.Random(1), requests=150, rate=4.0, promised=0.6)
        promised = [sent for sent in replica.sent.values() if sent.terms.promised]
        missed = [sent.missed for sent in promised if sent.missed]
        assert len(promised) > 60
        assert len(missed) <= len(promised) // 50, missed


@DEPTHS
def test_best_effort_yields_to_promises_and_still_finishes(depth: int) -> None:
    with driven(depth=depth) as replica:
        for index in range(20):
            replica.send(f"be{index}", 2000, 50, promised=False)
        replica.step()
        urgent = replica.send("urgent", 400, 20, ttft_s=0.6, tpot_s=0.05, tier="tight")
        replica.run()
        assert urgent.missed == ""
        assert all(len(sent.tokens) == sent.request.max_tokens for sent in replica.sent.values())


@DEPTHS
def test_outputs_are_exact_and_no_block_leaks_under_random_load(depth: int) -> None:
    rng = random.Random(7)
    with driven(depth=depth, kv_blocks=260, max_num_seqs=24, max_model_len=2048) as replica:
        total = replica.free_blocks
        shared = [5 + i % 900 for i in range(320)]
        aborted = set()
        for index in range(120):
            prompt = shared[: rng.randrange(320)] + [rng.randrange(3, 4000) for _ in range(rng.randint(1, 300))]
            replica.send(
                f"r{index}", prompt, rng.randint(1, 90), promised=rng.random() < 0.5, ttft_s=rng.uniform(0.2, 5)
            )
            for _ in range(rng.randrange(6)):
                replica.step()
            if rng.random() < 0.15:
                victim = rng.choice(list(replica.sent))
                if not replica.sent[victim].finish:
                    aborted.add(victim)
                    replica.abort(victim)
        replica.run()
        assert replica.scheduler._hook.preemptions > 0  # the load was meant to be too much for 260 blocks
        for name, sent in replica.sent.items():
            wanted = expected_tokens(sent)
            assert sent.tokens == wanted[: len(sent.tokens)], name
            assert len(sent.tokens) == len(wanted) or name in aborted, name
        assert replica.free_blocks == total
        assert len(replica.scheduler._hook.table) == 0
        assert not replica.scheduler._tracked
        assert not replica.scheduler.requests


@DEPTHS
def test_best_effort_is_preempted_first_and_before_the_step(depth: int) -> None:
    with driven(depth=depth, kv_blocks=200, max_model_len=2048) as replica:
        for index in range(4):
            replica.send(f"be{index}", 640, 300, promised=False)
        for _ in range(8):
            replica.step()
        promised = [replica.send(f"p{index}", 640, 40, ttft_s=0.4) for index in range(2)]
        replica.run()
        assert [sent.missed for sent in promised] == ["", ""]
        assert all(sent.request.num_preemptions == 0 for sent in promised)
        victims = [
            sent for name, sent in replica.sent.items() if name.startswith("be") and sent.request.num_preemptions
        ]
        assert victims
        assert all(sent.tokens == expected_tokens(sent) for sent in replica.sent.values())


@DEPTHS
def test_best_effort_gives_up_its_seat_for_a_promise(depth: int) -> None:
    with driven(depth=depth, max_num_seqs=4) as replica:
        for index in range(4):
            replica.send(f"be{index}", 64, 400, promised=False)
        for _ in range(6):
            replica.step()
        promised = replica.send("p", 64, 10, ttft_s=0.3)
        replica.run()
        assert promised.missed == ""
        assert sum(sent.request.num_preemptions for sent in replica.sent.values()) >= 1


@DEPTHS
def test_every_promised_decoder_is_in_every_batch(depth: int) -> None:
    with driven(depth=depth) as replica:
        decoders = [replica.send(f"d{index}", 32, 200, ttft_s=1.0) for index in range(8)]
        while any(not sent.times_s for sent in decoders):
            replica.step()
        for index in range(10):
            replica.send(f"p{index}", 3000, 4, ttft_s=30.0)
        for _ in range(40):
            scheduled = replica.step().num_scheduled_tokens
            assert all(sent.request.request_id in scheduled for sent in decoders)


def test_prefill_is_served_in_deadline_order() -> None:
    with driven() as replica:
        late = replica.send("late", 6000, 2, ttft_s=20.0)
        soon = replica.send("soon", 3000, 2, ttft_s=2.0)
        replica.run()
        assert soon.times_s[0] < late.times_s[0]


@DEPTHS
def test_the_attention_of_long_prompts_is_planned_for(depth: int) -> None:
    with driven(depth=depth, attention=1e-3) as replica:
        model = replica.preset.model
        running = [replica.send(f"d{i}", 50, 300, ttft_s=1.0, tpot_s=0.05, tier="tight") for i in range(4)]
        replica.run(until_s=replica.now_s + 0.5)
        long = []
        for i in range(3):
            alone_s = model.zero_load_prefill_s(6000)
            long.append(replica.send(f"p{i}", 6000, 5, ttft_s=3 * alone_s, tpot_s=0.1))
            replica.run(until_s=replica.now_s + 2 * alone_s)
        replica.run()
        assert [sent.missed for sent in (*running, *long) if sent.missed] == []
        learnt = replica.scheduler._hook.timer.model
        assert learnt.attention == 1e-3
        assert learnt.segments[0].k_tok == pytest.approx(model.segments[0].k_tok, rel=0.02)


def test_batches_are_whole_without_a_promise_in_sight() -> None:
    with driven() as replica:
        for index in range(8):
            replica.send(f"be{index}", 4000, 2, promised=False)
        assert replica.step().total_num_scheduled_tokens == 8192


def test_batches_are_short_while_a_promise_was_made_lately() -> None:
    with driven() as replica:
        replica.send("p", 64, 2)
        replica.run()
        for index in range(8):
            replica.send(f"be{index}", 4000, 2, promised=False)
        assert replica.step().total_num_scheduled_tokens < 1000
        replica.now_s += 60.0
        assert replica.step().total_num_scheduled_tokens > 4000


def test_a_promotion_moves_a_waiting_request_ahead() -> None:
    with driven() as replica:
        replica.send("p", 64, 400, ttft_s=1.0, tpot_s=0.05, tier="tight")
        waiting = [replica.send(f"be{index}", 3000, 2, promised=False, ttft_s=1.2) for index in range(12)]
        replica.step()
        hook = replica.scheduler._hook
        hook.promote(replica.scheduler._tracked["be11"], "tight", replica.now_s)
        replica.run()
        assert waiting[11].times_s[0] <= waiting[11].terms.ttft_deadline_s
        assert waiting[11].times_s[0] < waiting[5].times_s[0]


def test_a_stage_that_ends_moves_the_request_to_its_next_tier() -> None:
    stages = (
        StageTerms(StageKind.THINK.value, "loose", 0.2, 10, None),
        StageTerms(StageKind.ANSWER.value, "tight", 0.05, 30, None),
    )
    with driven() as replica:
        sent = replica.send("r", 64, 40, stages=stages)
        tiers = []
        while not sent.finish:
            replica.step()
            if len(replica.scheduler._hook.table):
                tiers.append((len(sent.tokens), float(replica.scheduler._hook.table.floats("tpot_s")[0])))
        assert all(tpot_s == (0.2 if tokens < 10 else 0.05) for tokens, tpot_s in tiers)
        assert {tpot_s for _, tpot_s in tiers} == {0.2, 0.05}


def test_idle_work_is_always_scheduled() -> None:
    rng = random.Random(3)
    with driven(kv_blocks=300, max_num_seqs=16, max_model_len=2048) as replica:
        for index in range(60):
            replica.send(f"r{index}", rng.randint(10, 1500), rng.randint(1, 60), promised=index % 2 == 0, ttft_s=0.5)
        while replica.scheduler.has_unfinished_requests():
            assert replica.step().total_num_scheduled_tokens > 0


def test_the_scheduler_follows_the_configuration() -> None:
    with driven(depth=1) as replica:
        assert type(replica.scheduler) is SyncSloScheduler
    with driven(depth=2) as replica:
        assert type(replica.scheduler) is AsyncSloScheduler


def test_no_name_of_ours_hides_one_of_vllm() -> None:
    meant = {"schedule", "update_from_output", "add_request", "shutdown"}
    meant |= {"_free_request", "_preempt_request", "_reserve_prefill_lookahead", "_abc_impl"}
    ours = {name for name in vars(SloScheduler) if not name.startswith("__")}
    assert ours & set(dir(Scheduler)) == meant
    with driven() as replica:
        plain = Scheduler(**replica.construction)
        ours = vars(replica.scheduler).keys() - vars(plain).keys()
        assert ours == {"_clock", "_token_limit", "_total_blocks", "_hook", "_tracked", "_by_request_id", "_numbers",
                        "_limits", "_last_budget", "_stalled", "_drafts", "_link", "_reporter",
                        "_ageing"}  # fmt: skip


@pytest.mark.parametrize("tier", ["loose", BEST_EFFORT])
def test_what_a_promise_finds_in_the_prefix_cache_is_the_last_to_be_evicted(tier: str) -> None:
    with driven(preset="opt-6.7b-a100", kv_blocks=200, prefix_caching=True) as replica:
        session = replica.send("session", 1600, 2)
        replica.run()
        replica.send("other", 960, 2)
        replica.run()
        on_tier = tier != BEST_EFFORT
        back = replica.send("back", [*session.request.prompt_token_ids, 5], 2, ttft_s=5.0, tier=tier, promised=on_tier)
        replica.send("rival", 1000, 2, ttft_s=0.5)  # its blocks are taken in the same step, before those of `back`
        replica.run()
        computed = sum(batch.num_scheduled_tokens.get("back", 0) for batch in replica.batches)
        assert len(back.tokens) == 2
        assert (computed == 2) is on_tier  # its own last prompt token, and one to decode
