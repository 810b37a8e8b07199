"""What goes into a batch, and what bounds it."""

from dataclasses import replace

import pytest
from core_engine import Engine
from core_instances import Instance, instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.core.admission import decide
from services.core.batch import BatchLimit, form_batch
from services.core.columns import columns_of
from services.core.perf_model import BatchShape
from services.core.presets import preset
from services.core.view import BEST_EFFORT_TIER, Decoder, PlanSettings, Prefill, ReplicaView

MODEL = preset("opt-6.7b-a100").model
SETTINGS = PlanSettings()


def view(decoders=(), prefills=(), free: int = 5000, **fields) -> ReplicaView:
    return ReplicaView(0.0, MODEL, tuple(decoders), tuple(prefills), free, 7000, **fields)


def decoder(name: str, slack_s: float, tier: int = 0, tpot_s: float = 0.05) -> Decoder:
    return Decoder(name, tier, slack_s, tpot_s, 100, 50)


def waiting(name: str, deadline_s: float, tokens: int, tier: int = 0) -> Prefill:
    return Prefill(name, tier, deadline_s, 0.05, tokens, output_tokens=10, promised=tier >= 0)


def test_the_batch_lasts_until_the_earliest_decoder_deadline() -> None:
    plan = form_batch(view([decoder("a", 0.06), decoder("b", 0.3)], [waiting("p", 2.0, 5000)]), SETTINGS)
    assert plan.limit is BatchLimit.SLACK
    assert plan.duration_s <= 0.06 < plan.duration_s + 1e-4
    assert plan.token_budget == MODEL.tokens_within(0.06)
    assert list(plan.decode_ids) == ["a", "b"]
    assert plan.prefill[0].tokens == plan.token_budget - 2


def test_the_margin_is_kept_on_every_deadline() -> None:
    careful = replace(view([decoder("a", 0.06)], [waiting("p", 2.0, 5000)]), model=replace(MODEL, margin_s=0.004))
    assert form_batch(careful, PlanSettings(margin_s=0.006)).duration_s <= 0.05


def test_batches_grow_up_to_the_cap_when_only_loose_decoders_run() -> None:
    loose = [decoder("a", 0.5, tier=1, tpot_s=0.1)]
    plan = form_batch(view(loose, [waiting("p", 2.0, 5000, tier=1)]), SETTINGS)
    assert plan.limit is BatchLimit.CAP
    assert plan.duration_s == pytest.approx(0.1, abs=1e-4)


def test_the_batch_ends_where_the_first_prefill_is_just_in_time() -> None:
    plan = form_batch(view([decoder("a", 0.5)], [waiting("p", 0.07, 300), waiting("q", 3.0, 5000)]), SETTINGS)
    assert plan.limit is BatchLimit.DEADLINE
    assert plan.duration_s <= 0.07
    assert [c.id for c in plan.prefill] == ["p", "q"]
    assert plan.prefill[0].tokens == 300


def test_a_prompt_of_several_batches_of_the_engines_limit_is_in_time_where_their_sum_is() -> None:
    settings = PlanSettings(caps_s=(0.2,), max_batch_tokens=256)
    prompt = replace(waiting("p", 0.12, 600), promised=False)  # 256 + 256 + 88 tokens take 42 + 42 + 31 ms
    assert decide(view(), [prompt], settings=settings).by_id["p"].admitted
    assert not decide(view(), [replace(prompt, deadline_s=0.114)], settings=settings).by_id["p"].admitted
    plan = form_batch(view((), [prompt]), settings)
    assert (plan.limit, plan.token_budget) == (BatchLimit.TOKENS, 256)
    assert plan.limit_s == pytest.approx(plan.duration_s)


def test_prefill_is_served_in_deadline_order() -> None:
    plan = form_batch(
        view((), [waiting("late", 3.0, 400), waiting("soon", 1.0, 400), waiting("last", 9.0, 9000)]), SETTINGS
    )
    assert [c.id for c in plan.prefill] == ["soon", "late", "last"]


def test_decoders_run_at_once_when_nothing_waits() -> None:
    plan = form_batch(view([decoder("a", 0.5)]), SETTINGS)
    assert plan.limit is BatchLimit.WORK
    assert plan.duration_s == pytest.approx(MODEL.seconds(BatchShape(1, 100, 1)))


def test_nothing_to_do_is_an_idle_plan() -> None:
    plan = form_batch(view(), SETTINGS)
    assert (plan.limit, plan.token_budget, plan.duration_s) == (BatchLimit.IDLE, 0, 0.0)
    assert "nothing to run" in plan.why


def test_best_effort_gets_what_is_left_and_only_short_batches() -> None:
    free = [Decoder("be", BEST_EFFORT_TIER, 0.0, 1.0, 100, 9), decoder("a", 0.5)]
    plan = form_batch(view(free, [waiting("bulk", 0.0, 9000, tier=BEST_EFFORT_TIER)]), SETTINGS)
    assert list(plan.decode_ids) == ["a"]
    assert plan.best_effort_decode_ids == ("be",)
    assert plan.best_effort_prefill[0].id == "bulk"
    assert plan.duration_s == pytest.approx(SETTINGS.best_effort_cap_s, abs=1e-4)


def test_best_effort_gets_something_on_an_engine_whose_batches_are_never_short() -> None:
    slow = preset("opt-30b-a100").model
    state = replace(view([decoder("a", 0.5)], [waiting("bulk", 0.0, 9000, tier=BEST_EFFORT_TIER)]), model=slow)
    plan = form_batch(state, SETTINGS)
    assert slow.seconds(BatchShape(0)) < SETTINGS.best_effort_cap_s < plan.duration_s
    assert plan.duration_s == pytest.approx(1.6 * slow.seconds(BatchShape(0)), abs=1e-3)
    assert not form_batch(state, replace(SETTINGS, best_effort_cap_s=0.0)).best_effort_prefill


def test_best_effort_fills_whole_batches_once_the_cap_has_lapsed() -> None:
    bulk = [waiting(f"bulk{i}", 0.0, 6000, tier=BEST_EFFORT_TIER) for i in range(3)]
    plan = form_batch(view((), bulk), PlanSettings(cap_lapsed=True))
    assert plan.token_budget == 8192


def test_best_effort_never_makes_a_decoder_late() -> None:
    bulk = [waiting("bulk", 0.0, 9000, tier=BEST_EFFORT_TIER)]
    plan = form_batch(view([decoder("a", 0.033)], bulk), PlanSettings(cap_lapsed=True))
    assert plan.limit is BatchLimit.SLACK
    assert plan.duration_s <= 0.033


def test_the_decoder_with_the_loosest_slack_is_skipped_to_save_a_prefill() -> None:
    decoders = [decoder("tight", 0.06)] + [decoder(f"loose{i}", 0.4 + i, tier=1, tpot_s=0.1) for i in range(200)]
    tokens = MODEL.tokens_within(0.05) - 50
    plan = form_batch(view(decoders, [waiting("p", 0.05, tokens)]), SETTINGS)
    assert "tight" in plan.decode_ids
    assert plan.prefill[0].tokens == tokens
    assert plan.duration_s <= 0.05
    assert len(plan.skipped_ids) >= 151
    assert "loose199" in plan.skipped_ids
    assert "loose0" not in plan.skipped_ids


def test_nobody_is_skipped_for_a_prefill_without_a_promise() -> None:
    decoders = [decoder(f"loose{i}", 0.4 + i, tier=1, tpot_s=0.1) for i in range(200)]
    unpromised = replace(waiting("p", 0.05, MODEL.tokens_within(0.05) - 50), promised=False)
    assert not form_batch(view(decoders, [unpromised]), SETTINGS).skipped_ids


def test_nobody_is_skipped_for_a_prefill_that_is_late_anyway() -> None:
    decoders = [decoder(f"d{i}", 0.5) for i in range(20)]
    plan = form_batch(view(decoders, [waiting("lost", 0.03, 5000), waiting("fine", 0.2, 100)]), SETTINGS)
    assert not plan.skipped_ids
    assert ("fine", 100) in [(c.id, c.tokens) for c in plan.prefill]


def test_chunks_stop_where_free_blocks_end_and_say_what_is_missing() -> None:
    plan = form_batch(view((), [waiting("p", 1.0, 640)], free=10), SETTINGS)
    assert plan.prefill[0].tokens == 160
    assert plan.missing_blocks == 30


def test_a_new_request_waits_for_a_seat() -> None:
    plan = form_batch(view([decoder("a", 0.5)], [waiting("p", 1.0, 64)], max_num_seqs=1), SETTINGS)
    assert plan.prefill == ()


def test_verified_tokens_count_against_the_budget() -> None:
    loose = [decoder(f"d{i}", 0.1) for i in range(50)]
    drafting = PlanSettings(verify_tokens=(4,), acceptance=(0.7,))
    plain = form_batch(view(loose, [waiting("p", 2.0, 5000)]), SETTINGS)
    with_drafts = form_batch(view(loose, [waiting("p", 2.0, 5000)]), drafting)
    assert plain.prefill[0].tokens - with_drafts.prefill[0].tokens == 150


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(instances(), st.booleans())
def test_no_batch_exceeds_its_limit_its_blocks_or_a_prompt(instance: Instance, as_columns: bool) -> None:
    held = tuple(replace(c, promised=True) for c in instance.candidates)
    view = replace(instance.view, prefills=(*instance.view.prefills, *held))
    if as_columns:
        view = replace(view, decoders=columns_of(view.decoders))
    plan = form_batch(view, instance.settings)
    assert plan.duration_s <= plan.limit_s + 1e-6
    left = {p.id: p.remaining_tokens for p in view.prefills}
    assert all(0 < chunk.tokens <= left[chunk.id] for chunk in plan.prefill)
    assert sorted((*plan.decode_ids, *plan.skipped_ids)) == sorted(d.id for d in view.decoders)
    computed = {p.id: p.computed_tokens for p in view.prefills}
    new = sum(-(-(d.context_tokens + 1) // 16) - -(-d.context_tokens // 16) for d in view.decoders)
    new += sum(-(-(computed[c.id] + c.tokens) // 16) - -(-computed[c.id] // 16) for c in plan.prefill)
    assert new <= view.free_blocks + plan.missing_blocks
    assert plan.why


def test_prefill_never_starves_beside_decoders_that_are_late() -> None:
    late = [Decoder(f"d{i}", 0, -0.5, 0.05, 100, 40) for i in range(30)]
    engine = Engine(view(late, [waiting("p", 5.0, 200)]), SETTINGS)
    for _ in range(20):
        engine.step()
    assert "p" not in engine.prefills
