"""Hours of random load on the hook in vLLM's real scheduler: thousands of steps, memory always short.

What `test_hook_stateful.py` does for odd orders of events this does for volume: preemption, aborts in mid-flight,
chunked prefill, cached prefixes, pending requests of every mode, speculation, one batch in flight and two.
"""

import random
from dataclasses import dataclass

import pytest

from services.core.slo import BEST_EFFORT, StageKind, VerdictMode
from services.worker.hash_tokens import HashTokens
from services.worker.link import Promote, SetCap
from services.worker.request_terms import StageTerms
from tests.services.worker.driven_scheduler import VOCABULARY, DrivenScheduler, Sent, driven
from tests.services.worker.hook_books import check_books, check_empty

REQUESTS = 250
SHARED = [5 + i % 900 for i in range(700)]
MODES = {"early": VerdictMode.EARLY, "late": VerdictMode.LATE, "firm": VerdictMode.FIRM}


@dataclass
class Events:
    """What happened, so that a load that tests nothing is noticed."""

    steps: int = 0
    aborted_running: int = 0
    idle: int = 0
    most_idle: int = 0
    drafts: int = 0
    accepted: int = 0


def send(replica: DrivenScheduler, rng: random.Random) -> None:
    kind = rng.choice(["tight", "loose", "none", "none", *MODES])
    tier = "tight" if kind == "tight" else ("none" if kind == "none" else "loose")
    tpot_s = rng.choice([0.03, 0.05, 0.1])
    output = rng.randint(1, 90)
    tier_name = BEST_EFFORT if tier == "none" else tier
    stages = None
    if rng.random() < 0.3 and output > 3:
        think = rng.randint(1, output - 1)
        stages = (
            StageTerms(StageKind.THINK.value, tier_name, tpot_s, think, None),
            StageTerms(StageKind.ANSWER.value, tier_name, 2 * tpot_s, output - think, None),
        )
    prompt = SHARED[: rng.choice([0, 0, 32, 250, 640])] + [rng.randrange(3, 4000) for _ in range(rng.randint(1, 290))]
    replica.send(
        f"r{len(replica.sent)}",
        prompt,
        output,
        ttft_s=rng.choice([0.05, 0.5, 3.0]),
        tpot_s=tpot_s,
        tier=tier,
        promised=kind in ("tight", "loose"),
        pending=MODES.get(kind),
        stages=stages,
        forecast=rng.choice([None, 5, 200]),
        application=rng.choice(["chatbot", "coder"]),
    )


def disturb(replica: DrivenScheduler, rng: random.Random, aborted: set[str], events: Events) -> None:
    alive = [name for name, sent in replica.sent.items() if not sent.finish and name not in aborted]
    if alive and rng.random() < 0.12:
        victim = rng.choice(alive)
        aborted.add(victim)
        events.aborted_running += bool(replica.sent[victim].tokens)
        replica.abort(victim)
    elif alive and rng.random() < 0.08:
        replica.scheduler._obey(Promote(rng.choice(alive), "loose"), replica.now_s)
    elif rng.random() < 0.03:
        replica.scheduler._obey(SetCap(rng.choice([None, 0.03, 0.2])), replica.now_s)
    elif rng.random() < 0.03:
        replica.now_s += rng.choice([0.3, 7.0])


def step(replica: DrivenScheduler, events: Events) -> None:
    output = replica.step()
    check_books(replica)
    events.steps += 1
    events.drafts += sum(map(len, output.scheduled_spec_decode_tokens.values()))
    waits_for_output = replica.depth > 1 and any(request.num_in_flight_tokens for request in replica.scheduler.running)
    starved = replica.scheduler.has_unfinished_requests() and not output.total_num_scheduled_tokens
    events.idle = events.idle + 1 if starved and not waits_for_output else 0
    events.most_idle = max(events.most_idle, events.idle)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("drafts", [0, 5])
@pytest.mark.parametrize("caching", [False, True])
def test_thousands_of_steps_lose_nothing_and_leave_nothing(depth: int, drafts: int, caching: bool) -> None:
    rng = random.Random(f"{depth} {drafts} {caching}")
    events, aborted = Events(), set[str]()
    shape = {"kv_blocks": 100, "max_num_seqs": 20, "max_batch_tokens": 512, "max_model_len": 1024}
    with driven(depth=depth, prefix_caching=caching, speculation_tokens=drafts, **shape) as replica:
        total_blocks = replica.free_blocks
        while len(replica.sent) < REQUESTS:
            for _ in range(rng.choice([0, 1, 1, 4])):
                send(replica, rng)
            for _ in range(rng.randrange(12)):
                step(replica, events)
                disturb(replica, rng, aborted, events)
        while replica.scheduler.has_unfinished_requests():
            assert events.steps < 20_000, "somebody starves"
            step(replica, events)
        replica.run()
        for name, sent in replica.sent.items():
            wanted = expected_tokens(sent)
            assert sent.tokens == wanted if name not in aborted else sent.tokens == wanted[: len(sent.tokens)], name
        check_empty(replica, total_blocks)
        assert replica.scheduler._hook.preemptions > 5
        assert events.aborted_running > 5
        assert events.steps > 1000
        assert events.most_idle <= 2  # a batch that could not be executed is followed by one of vLLM's own
        assert bool(events.drafts) == bool(drafts)


def expected_tokens(sent: Sent) -> list[int]:
    prompt = sent.request.num_prompt_tokens
    return HashTokens(VOCABULARY, (0, 1, 2)).continuation(sent.terms.digest, prompt, sent.request.max_tokens)
