"""What was admitted, executed batch by batch by the batch former with the exact model, meets every deadline."""

import random
from dataclasses import replace

import pytest
from core_engine import Engine
from core_instances import TPOTS_S, Instance, instances
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from services.core.admission import Policy, decide
from services.core.presets import preset
from services.core.view import Decoder, PlanSettings, Prefill, ReplicaView

MANY = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))


def admit(engine: Engine, candidates: list[Prefill], policy: Policy) -> list[Prefill]:
    """Decide, promise what is admitted, and return what is left waiting."""
    decisions = decide(engine.view(), candidates, policy, engine.settings).by_id
    for candidate in candidates:
        if decisions[candidate.id].admitted:
            engine.prefills[candidate.id] = replace(candidate, promised=True)
    return [c for c in candidates if not decisions[c.id].admitted]


def run_dry(engine: Engine) -> None:
    for _ in range(3000):
        if not engine.decoders and not engine.prefills:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


@MANY
@given(instances(late=False), st.sampled_from(Policy))
def test_an_accepted_plan_meets_every_deadline(instance: Instance, policy: Policy) -> None:
    base = decide(instance.view, (), policy, instance.settings)
    assume(base.base_feasible)
    empty = decide(instance.view, instance.candidates, policy, instance.settings)
    assume(empty.admitted_ids)
    engine = Engine(instance.view, instance.settings)
    admit(engine, list(instance.candidates), policy)
    run_dry(engine)
    assert engine.late == []


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(instances(late=False, most_candidates=10), st.sampled_from(Policy), st.randoms(use_true_random=False))
def test_arrivals_at_every_batch_boundary_break_no_promise(
    instance: Instance, policy: Policy, chance: random.Random
) -> None:
    engine = Engine(
        replace(instance.view, decoders=(), prefills=(), free_blocks=instance.view.total_blocks), instance.settings
    )
    later = [replace(c, computed_tokens=0, started=False) for c in instance.candidates]
    waiting: list[Prefill] = []
    while later:
        while later and chance.random() < 0.5:
            arrival = later.pop()
            waiting.append(
                replace(arrival, deadline_s=arrival.deadline_s - 10.0 + engine.now_s, arrival_s=engine.now_s)
            )
        waiting = admit(engine, waiting, policy)
        if engine.decoders or engine.prefills:
            engine.step()
        else:
            engine.now_s += 0.01
    run_dry(engine)
    assert engine.late == []


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    instances(late=False),
    st.sampled_from(Policy),
    st.integers(2, 10),
    st.lists(st.sampled_from([0.0, 1.0, 1.0]), min_size=3, max_size=3),
)
def test_an_accepted_plan_with_drafts_meets_every_deadline(
    instance: Instance, policy: Policy, most: int, acceptance: list[float]
) -> None:
    """Rates of 0 and 1, at which each step yields what is expected of it; others do so on average only."""
    plan = replace(instance.settings, acceptance=tuple(acceptance), max_verify_tokens=most)
    assume(decide(instance.view, (), policy, plan).base_feasible)
    engine = Engine(instance.view, plan)
    assume(len(admit(engine, list(instance.candidates), policy)) < len(instance.candidates))
    run_dry(engine)
    assert engine.late == []  # a prefill may wait a batch for the blocks of one that ends sooner, if that is in time


def test_drafts_of_a_tier_that_accepts_none_take_no_memory_from_the_others() -> None:
    """Seen once: with the last blocks nearly used up, rejected drafts of one tier needed one more."""
    chosen = preset("opt-6.7b-a100")
    running = (
        Decoder("d0", 1, 0.5, 0.1, 12, 5), Decoder("d1", 0, 0.5, 0.05, 1, 7), Decoder("d2", 1, 0.0625, 0.1, 1, 5),
    )  # fmt: skip
    asked = [
        Prefill("c0", 0, 1.0, 0.05, 124, 0, 7), Prefill("c1", 1, 1.0, 0.1, 237, 0, 5),
        Prefill("c4", 0, 1.0, 0.05, 446, 0, 5), *(Prefill(f"c{n}", 0, 1.0, 0.05, 1, 0, 1) for n in (2, 3, 5, 6)),
    ]  # fmt: skip
    plan = PlanSettings(acceptance=(1.0, 0.0), max_verify_tokens=2, early_spend=0.0, hopeless_margin_s=0.0)
    engine = Engine(ReplicaView(0.0, chosen.model, running, (), 54, 57, max_num_seqs=512), plan)
    assert admit(engine, asked, Policy.GREEDY) == []
    run_dry(engine)
    assert engine.late == []
    assert [batch.missing_blocks for batch in engine.batches] == [0] * len(engine.batches)
    assert any(max(batch.verify_tokens) > 1 for batch in engine.batches)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(instances(late=False), st.integers(2, 10), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_planning_with_drafts_keeps_no_less_than_without(
    instance: Instance, most: int, acceptance: list[float]
) -> None:
    drafting = replace(instance.settings, acceptance=tuple(acceptance), max_verify_tokens=most)
    plain = decide(instance.view, instance.candidates, Policy.MH, instance.settings)
    found = decide(instance.view, instance.candidates, Policy.MH, drafting)
    assert (found.base_feasible, found.kept_weight) >= (plain.base_feasible, plain.kept_weight)


def test_promises_hold_while_many_requests_come_to_their_last_step() -> None:
    """A last step brings fewer tokens than the others and is due earlier: the plan knows, as execution will."""
    rng = random.Random(7)
    chosen = preset("opt-6.7b-a100")
    plan = PlanSettings(acceptance=(1.0, 1.0), max_verify_tokens=3)
    promised = 0
    for _ in range(3):
        running = []
        for index in range(256):
            tpot_s = TPOTS_S[index % 2]
            due_s, context = tpot_s * rng.uniform(1.0, 2.0), rng.randint(50, 900)
            running.append(Decoder(f"d{index}", index % 2, due_s, tpot_s, context, rng.randint(2, 90)))
        asked = [
            Prefill(
                f"c{index}", index % 2, rng.uniform(0.1, 2.0), TPOTS_S[index % 2], rng.randint(50, 1500), 0,
                rng.randint(10, 90),
            )
            for index in range(32)
        ]  # fmt: skip
        engine = Engine(ReplicaView(0.0, chosen.model, running, (), 100_000, 120_000, max_num_seqs=512), plan)
        promised += len(asked) - len(admit(engine, asked, Policy.MH))
        run_dry(engine)
        assert engine.late == []
        assert max(batch.verify_tokens[0] for batch in engine.batches) > 1
    assert promised > 60


def test_drafts_carry_what_plain_decoding_cannot_and_keep_it() -> None:
    chosen = preset("opt-13b-a100")
    running = tuple(Decoder(f"d{i}", 0, 0.06, 0.05, 200, 97) for i in range(40))
    view = ReplicaView(0.0, chosen.model, running, (), 8000, 9000)
    burst = [Prefill(f"c{i}", i % 2, 0.5 + 0.06 * i, TPOTS_S[i % 2], 900, output_tokens=80) for i in range(8)]
    plain, drafting = PlanSettings(), PlanSettings(acceptance=(0.8, 0.6), max_verify_tokens=8)
    engine = Engine(view, drafting)
    promised = len(burst) - len(admit(engine, burst, Policy.MH))
    run_dry(engine)
    assert promised > len(decide(view, burst, Policy.MH, plain).admitted_ids)
    assert engine.late == []
    assert max(plan.verify_tokens[0] for plan in engine.batches) > 1


@pytest.mark.parametrize("hold", [False, True])
def test_waves_of_thirty_candidates_keep_every_promise(hold: bool) -> None:
    chosen = preset("opt-6.7b-a100")
    view = ReplicaView(0.0, chosen.model, (), (), chosen.kv_blocks, chosen.kv_blocks)
    engine = Engine(view, PlanSettings(hold_first_token=hold))
    promised = 0
    for wave in range(40):
        candidates = [
            Prefill(
                f"w{wave}-{i}", i % 2, engine.now_s + 0.3 + 0.1 * (i % 7), TPOTS_S[i % 2], 100 + 37 * i, 0, 20 + 9 * i
            )
            for i in range(30)
        ]
        promised += 30 - len(admit(engine, candidates, Policy.MH))
        for _ in range(5):
            engine.step()
    run_dry(engine)
    assert promised > 150
    assert engine.late == []
