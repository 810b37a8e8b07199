"""Plans with draft tokens at the edges: the engine's limits, a request's last step, memory, and rates left out."""

import numpy as np
from core_instances import TPOTS_S, Instance, instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.core.admission import Policy, decide, plan_for
from services.core.batch import form_batch
from services.core.columns import columns_of
from services.core.draft_lengths import choose_lengths
from services.core.fluid import flow_at, fluid_of
from services.core.memory import forecast, memory_surely_fits, surely_fits
from services.core.perf_model import BatchShape, PerfModel, Segment
from services.core.problem import Problem, problem_of
from services.core.simulate import IN_TIME, simulate
from services.core.speculation import expected_tokens
from services.core.view import Decoder, PlanSettings, Prefill, ReplicaView

MODEL = PerfModel((Segment(7e-5, b=0.025),))


def decoder(name: str, *, tier: int = 0, due_s: float = 0.2, remaining: int = 100) -> Decoder:
    return Decoder(name, tier, due_s, TPOTS_S[tier], 100, remaining)


def view(decoders: list[Decoder], prefills: list[Prefill] | None = None, model: PerfModel = MODEL) -> ReplicaView:
    return ReplicaView(0.0, model, decoders, prefills or [], 9000, 10_000)


def problem_from(instance: Instance, plan: PlanSettings) -> Problem:
    items = sorted([*instance.view.prefills, *instance.candidates], key=lambda p: (p.deadline_s, p.id))
    return problem_of(instance.view, columns_of(instance.view.decoders), items, plan, 0.0)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(instances(late=False), st.integers(2, 8), st.floats(0.1, 0.95))
def test_the_memory_forecast_with_drafts_counts_every_request_once(
    instance: Instance, verify: int, acceptance: float
) -> None:
    problem = problem_from(instance, PlanSettings(verify_tokens=(verify,) * 3, acceptance=(acceptance,) * 3))
    queue, gain = problem.queue, expected_tokens(verify, acceptance)
    standing = np.full(len(queue.tier), IN_TIME, np.int64)
    outcome = simulate(problem, standing, 0.1, np.inf)
    began, joined = np.maximum(outcome.began, 0), np.maximum(outcome.joined, 1)
    found = forecast(problem, standing, began, joined).peak_blocks

    def blocks(tokens: float) -> int:
        return int(np.ceil(tokens / 16 - 1e-9))

    ends = joined + np.ceil((queue.output - 1) / gain - 1e-9).astype(int)
    peak, most = 0, len(instance.view.decoders) + len(queue.tier) + 3
    for k in range(int(max([*problem.base.steps, *ends], default=0))):
        used = sum(
            blocks(length + k * gain + verify)
            for length, steps in zip(problem.base.length, problem.base.steps, strict=True)
            if k < steps
        )
        for row in range(len(queue.tier)):
            prompt = int(queue.remaining[row] + queue.computed[row])
            if joined[row] <= k < ends[row]:
                used += blocks(prompt + (k - joined[row]) * gain + verify)
            elif (began[row] <= k or queue.computed[row] > 0) and k < joined[row]:
                used += blocks(prompt)
        peak = max(peak, used)
    assert peak <= found <= peak + most  # whole blocks are rounded up by tier


def test_no_plan_decodes_more_tokens_than_a_batch_holds() -> None:
    drafting = PlanSettings(verify_tokens=(8,), acceptance=(0.5,), max_batch_tokens=512)
    running = [decoder(f"d{i}", due_s=0.3) for i in range(50)]
    asked = [Prefill(f"c{i}", 0, 5.0, 0.05, 4, output_tokens=50) for i in range(40)]
    kept = decide(view(running), asked, Policy.MH, drafting).admitted_ids
    assert 8 * (len(running) + len(kept)) <= 512


def test_the_stated_model_has_no_room_where_the_decoders_exceed_a_batch() -> None:
    plan = PlanSettings(verify_tokens=(4,), acceptance=(0.9,), max_batch_tokens=100)
    columns = columns_of([decoder(f"d{i}") for i in range(30)])
    fluid = fluid_of(problem_of(view(list(columns)), columns, [], plan, 0.0), 0.2, np.zeros(0), 1)
    assert flow_at(fluid, np.array([30])).room < 0
    assert flow_at(fluid, np.array([25])).room == 0


def test_a_tier_whose_acceptance_is_not_given_accepts_nothing() -> None:
    instance_view = view([decoder("a", tier=0), decoder("b", tier=1)])
    problem = problem_of(instance_view, columns_of(instance_view.decoders), [], PlanSettings(), 0.0)
    fluid = fluid_of(problem, 0.1, np.array([0.8]), 10)
    assert fluid.acceptance.tolist() == [0.8, 0.0]


def test_a_step_is_due_with_the_last_token_that_is_left() -> None:
    drafting = PlanSettings(verify_tokens=(4,), acceptance=(0.9,), caps_s=(0.3,))
    work = [Prefill("p", 0, 5.0, 0.05, 20_000, promised=True)]
    many = form_batch(view([decoder("a", due_s=0.06)], work), drafting)
    last = form_batch(view([decoder("a", due_s=0.06, remaining=1)], work), drafting)
    two = form_batch(view([decoder("a", due_s=0.06, remaining=2)], work), drafting)
    assert many.duration_s > 0.15
    assert last.duration_s <= 0.06
    assert 0.06 < two.duration_s <= 0.11


def test_a_promised_answer_of_two_tokens_is_due_one_tpot_after_its_first() -> None:
    drafting = PlanSettings(verify_tokens=(8,), acceptance=(0.95,), caps_s=(0.3,))
    short = Prefill("short", 0, 0.06, 0.05, 100, output_tokens=2)
    long = Prefill("long", 0, 0.365, 0.05, 4200, output_tokens=2, promised=True)
    found = decide(view([], [long]), [short], Policy.MH, drafting)
    # After it the second batch may last 50 ms, not seven times as long; the third would end after 377 ms.
    assert found.admitted_ids == ()


def test_a_batch_goes_without_drafts_where_they_would_make_the_last_token_late() -> None:
    drafting = PlanSettings(acceptance=(1.0,))
    model = PerfModel((Segment(4e-4, b=8e-3),))
    many = [decoder(f"d{i}", due_s=0.4, remaining=100) for i in range(11)]
    assert form_batch(view(many, model=model), drafting).verify_tokens[0] > 1
    last = decoder("last", due_s=0.05, remaining=1)
    for work in ([], [Prefill("p", 0, 5.0, 0.05, 20_000, promised=True)]):
        plan = form_batch(view([*many, last], work, model), drafting)
        assert plan.duration_s <= 0.05
    assert plan_for(view([*many, last], model=model), (), Policy.MH, drafting).verify_tokens == (1,)


def test_lengths_fit_into_the_engines_batch() -> None:
    chosen = choose_lengths(MODEL, [100], [0.05], [0.9], cap_s=0.3, max_batch_tokens=256)
    assert chosen.verify_tokens[0] * 100 <= 256
    assert choose_lengths(MODEL, [100], [0.05], [0.9], cap_s=0.3).verify_tokens[0] * 100 > 256


def test_lengths_keep_the_pace_of_decoders_that_leave_no_room_for_a_prefill() -> None:
    model = PerfModel((Segment(1e-4, k_req=1e-3, k_step=0.02151, b=0.01039),))
    assert model.seconds(BatchShape(36, 0, 36)) < 0.05
    assert model.seconds(BatchShape(72, 0, 36, 1)) > 1.5 * 0.05
    chosen = choose_lengths(model, [36], [0.05], [0.5], cap_s=0.2)
    assert chosen.verify_tokens == (1,)
    assert chosen.prefill_tokens_per_s == 0


def test_a_cap_shorter_than_any_pace_means_plain_decoding() -> None:
    assert choose_lengths(MODEL, [4], [0.05], [0.9], cap_s=0.01).verify_tokens == (1,)
    assert choose_lengths(MODEL, [0], [np.inf], [0.9], cap_s=0.01).verify_tokens == (1,)
    assert choose_lengths(MODEL, [4], [0.05], [1.0], cap_s=0.01, max_verify_tokens=1).verify_tokens == (1,)


def test_a_batch_goes_without_drafts_where_memory_does_not_last_for_them() -> None:
    drafting = PlanSettings(acceptance=(0.9,))
    filling_up = [Decoder(f"d{i}", 0, 0.4, 0.05, 15, 1) for i in range(10)]  # the next token fills their block
    work = [Prefill("p", 0, 5.0, 0.05, 16, output_tokens=1, promised=True)]
    for prefills, free in (([], 0), (work, 1)):
        roomy = form_batch(ReplicaView(0.0, MODEL, filling_up, prefills, 100, 110), drafting)
        full = form_batch(ReplicaView(0.0, MODEL, filling_up, prefills, free, 10 + free), drafting)
        assert roomy.verify_tokens[0] > 1
        assert full.verify_tokens[0] == 1
        assert full.missing_blocks == 0


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(instances(), st.integers(1, 6), st.floats(0.0, 1.0))
def test_what_surely_fits_is_found_to_fit_by_the_forecast(instance: Instance, verify: int, acceptance: float) -> None:
    problem = problem_from(instance, PlanSettings(verify_tokens=(verify,) * 3, acceptance=(acceptance,) * 3))
    standing = np.full(len(problem.queue.tier), IN_TIME, np.int64)
    outcome = simulate(problem, standing, 0.1, np.inf)
    found = forecast(problem, standing, outcome.began, outcome.joined)
    if memory_surely_fits(problem, standing):
        assert found.peak_blocks <= problem.limits.blocks
    if surely_fits(problem, standing):
        assert found.excess_s <= 1e-9


def test_what_surely_fits_is_common_on_a_replica_that_is_not_full() -> None:
    prompt = Prefill("p", 0, 5.0, 0.05, 500, output_tokens=50)
    running = [decoder(f"d{i}") for i in range(50)]
    plan = PlanSettings(verify_tokens=(2,), acceptance=(0.8,))
    for blocks, enough in ((1000, True), (300, False)):
        full = ReplicaView(0.0, MODEL, running, [prompt], blocks, blocks + 350)
        problem = problem_of(full, columns_of(running), [prompt], plan, 0.0)
        assert surely_fits(problem, np.array([IN_TIME])) == enough
