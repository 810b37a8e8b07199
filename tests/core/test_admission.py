"""Decisions and the constraints they state."""

import math
from dataclasses import replace

import pytest

from services.core.admission import Policy, decide
from services.core.constraint import ConstraintKind
from services.core.presets import preset
from services.core.view import BEST_EFFORT_TIER, Decoder, PlanSettings, Prefill, ReplicaView

MODEL = preset("opt-6.7b-a100").model
EVERY_POLICY = pytest.mark.parametrize("policy", list(Policy))


def view(decoders=(), prefills=(), total: int = 7000, **fields) -> ReplicaView:
    used = sum(-(-d.context_tokens // 16) for d in decoders) + sum(-(-p.computed_tokens // 16) for p in prefills)
    return ReplicaView(0.0, MODEL, tuple(decoders), tuple(prefills), total - used, total, **fields)


def candidate(name: str, deadline_s: float, prompt: int, output: int = 50, tier: int = 0, **fields) -> Prefill:
    return Prefill(name, tier, deadline_s, 0.05 * (tier + 1), prompt, 0, output, arrival_s=0.0, **fields)


def running(count: int, tier: int = 0, context: int = 100, remaining: int = 100) -> list[Decoder]:
    return [Decoder(f"d{i}", tier, 0.05 * (tier + 1), 0.05 * (tier + 1), context, remaining) for i in range(count)]


@EVERY_POLICY
def test_what_fits_is_admitted_with_its_predictions(policy: Policy) -> None:
    decision = decide(view(running(10)), [candidate("c", 0.5, 600)], policy).by_id["c"]
    assert decision.admitted
    assert decision.constraint.kind is ConstraintKind.NONE
    assert decision.predicted_ttft_s == decision.predicted_first_token_s <= 0.5
    assert 0.025 < decision.predicted_tpot_s <= 0.05


@EVERY_POLICY
def test_a_promise_is_not_broken_for_a_candidate(policy: Policy) -> None:
    held = candidate("held", 0.30, 1500, promised=True)
    decisions = decide(view(running(10), [held]), [candidate("c", 0.2, 1500, weight=1000)], policy)
    assert decisions.admitted_ids == ()
    assert decisions.base_feasible


@EVERY_POLICY
def test_the_prefill_budget_is_named_with_window_and_tokens(policy: Policy) -> None:
    held = candidate("held", 0.30, 3000, promised=True)
    constraint = decide(view((), [held]), [candidate("c", 0.25, 3000)], policy).by_id["c"].constraint
    assert constraint.kind in (ConstraintKind.PREFILL_BUDGET, ConstraintKind.HOPELESS)
    constraint = decide(view((), [held]), [candidate("c", 0.35, 1500)], policy).by_id["c"].constraint
    assert constraint.kind is ConstraintKind.PREFILL_BUDGET
    assert constraint.unit == "tokens"
    assert constraint.needed > constraint.available >= 0
    assert constraint.window_end_s in (0.30, 0.35)
    assert "tokens wanted in the next" in constraint.sentence


@EVERY_POLICY
def test_memory_is_named_with_blocks(policy: Policy) -> None:
    full = view(running(40, context=160, remaining=100), total=690)
    constraint = decide(full, [candidate("c", 1.0, 160, 200)], policy).by_id["c"].constraint
    assert constraint.kind is ConstraintKind.KV_BLOCKS
    assert constraint.needed > constraint.available == 690
    assert "KV memory" in constraint.sentence


@EVERY_POLICY
def test_tpot_is_named_with_its_tier(policy: Policy) -> None:
    model = preset("opt-6.7b-a100").model
    most = model.tokens_within(0.05)
    decoders = [replace(d, next_deadline_s=0.2) for d in running(most, context=10, remaining=1000)]
    decisions = decide(view(decoders, total=10**6, max_num_seqs=1000), [candidate("c", 5.0, 10, 900)], policy)
    constraint = decisions.by_id["c"].constraint
    assert constraint.kind is ConstraintKind.TPOT
    assert constraint.tier == 0
    assert constraint.needed > constraint.available == pytest.approx(0.05)


@EVERY_POLICY
def test_a_hopeless_request_is_called_so(policy: Policy) -> None:
    constraint = decide(view(), [candidate("c", 0.05, 5000)], policy).by_id["c"].constraint
    assert constraint.kind is ConstraintKind.HOPELESS
    assert constraint.needed == pytest.approx(7.52e-5 * 5000 + 3e-3)
    assert constraint.available == pytest.approx(0.05)


@EVERY_POLICY
def test_seats_are_named(policy: Policy) -> None:
    constraint = decide(view(running(4), max_num_seqs=4), [candidate("c", 1.0, 100)], policy).by_id["c"].constraint
    assert constraint.kind is ConstraintKind.MAX_SEQS
    assert (constraint.needed, constraint.available) == (5, 4)


def test_mh_drops_the_longest_where_greedy_drops_the_latest() -> None:
    candidates = [candidate("long", 0.30, 2600)] + [candidate(f"short{i}", 0.31, 500) for i in range(5)]
    assert decide(view(), candidates, Policy.GREEDY).admitted_ids[0] == "long"
    kept = decide(view(), candidates, Policy.MH).admitted_ids
    assert "long" not in kept
    assert len(kept) == 5


def test_weight_protects_from_being_dropped() -> None:
    candidates = [candidate("long", 0.30, 2600, weight=10)] + [candidate(f"short{i}", 0.31, 500) for i in range(5)]
    assert "long" in decide(view(), candidates, Policy.MH).admitted_ids


def test_a_longer_cap_is_found_on_conflict() -> None:
    settings = PlanSettings(caps_s=(0.1, 0.2))
    burst = [candidate(f"c{i}", 0.8, 640, tier=1) for i in range(14)]
    few = decide(view(), burst, Policy.MH, PlanSettings(caps_s=(0.1,)))
    more = decide(view(), burst, Policy.MH, settings)
    assert len(more.admitted_ids) > len(few.admitted_ids)
    assert more.cap_s == 0.2


def test_early_spending_is_used_only_on_conflict() -> None:
    spending = PlanSettings(caps_s=(0.2,), early_spend=0.2)
    decoders = running(30, tier=1, remaining=200)
    burst = [candidate(f"c{i}", 0.6, 500, tier=1) for i in range(16)]
    without = decide(view(decoders), burst, Policy.MH, replace(spending, early_spend=0.0))
    with_it = decide(view(decoders), burst, Policy.MH, spending)
    assert len(with_it.admitted_ids) > len(without.admitted_ids)
    assert with_it.early_spend == 0.2
    assert decide(view(decoders), burst[:2], Policy.MH, spending).early_spend == 0.0


def test_holding_the_first_token_makes_room_for_prefill() -> None:
    burst = [candidate(f"c{i}", 0.4 + 0.05 * i, 700, tier=0, output=40) for i in range(14)]
    free = decide(view(), burst, Policy.MH, PlanSettings())
    held = decide(view(), burst, Policy.MH, PlanSettings(hold_first_token=True))
    assert len(held.admitted_ids) >= len(free.admitted_ids)


def test_what_is_late_already_is_not_delayed_further_but_does_not_block_for_ever() -> None:
    broken = candidate("broken", 0.05, 3000, promised=True)
    decisions = decide(view((), [broken]), [candidate("soon", 0.2, 500), candidate("later", 2.0, 500)], Policy.MH)
    assert not decisions.base_feasible
    assert decisions.admitted_ids == ("later",)


def test_pending_requests_of_the_view_are_decided_with_the_candidates() -> None:
    pending = candidate("pending", 0.5, 500)
    decisions = decide(view((), [pending]), [candidate("c", 0.6, 500)])
    assert [d.id for d in decisions.decisions] == ["pending", "c"]
    assert decisions.admitted_ids == ("pending", "c")


def test_best_effort_prefills_are_not_decided() -> None:
    bulk = replace(candidate("bulk", 0.0, 500), tier=BEST_EFFORT_TIER)
    assert decide(view((), [bulk]), []).decisions == ()


def test_kv_held_by_nobody_in_the_view_is_not_counted_as_free() -> None:
    idle = ReplicaView(0.0, MODEL, (), (), 50, 1000)
    assert decide(idle, [candidate("c", 1.0, 640, 300)]).by_id["c"].constraint.kind is ConstraintKind.KV_BLOCKS


def test_an_unknown_arrival_gives_no_ttft_but_a_time() -> None:
    decision = decide(view(), [replace(candidate("c", 0.5, 100), arrival_s=math.nan)]).by_id["c"]
    assert math.isnan(decision.predicted_ttft_s)
    assert decision.predicted_first_token_s < 0.5


def test_batches_in_flight_are_charged() -> None:
    busy = replace(view(), engine_free_at_s=0.2)
    assert decide(view(), [candidate("c", 0.25, 800)]).admitted_ids == ("c",)
    assert decide(busy, [candidate("c", 0.25, 800)]).admitted_ids == ()
