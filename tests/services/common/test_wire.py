import math

import pytest

from protos import planner_pb2, types_pb2
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.common.rendezvous import planner_for
from services.common.wire import (
    constraint_to_wire,
    engine_request_from_wire,
    perf_model_from_wire,
    perf_model_to_wire,
    stage_from_wire,
    stage_to_wire,
    stages_from_wire,
    tier_index,
    tier_name,
)
from services.core.constraint import FITS, Constraint, ConstraintKind
from services.core.perf_model import PerfModel, Segment
from services.core.slo import StageKind, StageSlo, Tier
from services.core.view import Decoder, Prefill

TIERS = (Tier("tight", 0.05), Tier("loose", 0.1))


def a_clock() -> Clock:
    return Clock(monotonic_s=lambda: 100.0, wall_s=lambda: 1_700_000_000.0)


def an_engine_request(**fields: object) -> planner_pb2.EngineRequest:
    values: dict[str, object] = {
        "request_id": "r1",
        "attempt": 1,
        "tier": "loose",
        "promised": True,
        "prompt_tokens": 40,
        "forecast_tokens": 9,
        "ttft_deadline_us": 1_700_000_001_500_000,
        "next_deadline_us": 1_700_000_000_250_000,
        "tpot_ms": 100.0,
        "application": "chatbot",
        "max_tokens": 64,
        **fields,
    }
    return planner_pb2.EngineRequest(**values)  # type: ignore[arg-type]


def test_a_performance_model_survives_the_round_trip() -> None:
    model = PerfModel((Segment(7e-5, 1e-8, 1e-5, 0.0, 0.02), Segment(8e-5, b=0.003)), 0.0004, 0.98, 1.3e-3)
    assert perf_model_from_wire(perf_model_to_wire(model)) == model


@pytest.mark.parametrize("bad", [math.nan, -1e-6, math.inf])
def test_a_coefficient_that_means_nothing_is_refused(bad: float) -> None:
    wire = types_pb2.PerfModel(segments=[types_pb2.PerfSegment(k_tok=1e-4, b=bad)])
    with pytest.raises(SloServeError) as refused:
        perf_model_from_wire(wire)
    assert refused.value.reason is Reason.STATE_INVALID


def test_a_stage_survives_the_round_trip_with_its_end_token() -> None:
    for stage in (
        StageSlo(StageKind.TOOL_CALL, 0.3, None, 0.05, 128, end_token_id=0),
        StageSlo(StageKind.ANSWER, None, None, 0.1, 7),
    ):
        wire = stage_to_wire(stage, "tight")
        assert stage_from_wire(wire) == stage
        assert wire.tier == "tight"


def test_a_request_without_stages_or_with_an_empty_one_is_refused() -> None:
    for stages in ([], [types_pb2.Stage(tpot_ms=50, max_tokens=0)], [types_pb2.Stage(tpot_ms=-1, max_tokens=4)]):
        with pytest.raises(SloServeError):
            stages_from_wire(stages)


def test_tiers_travel_by_name_and_unknown_ones_are_refused() -> None:
    assert [tier_index(name, TIERS) for name in ("tight", "loose", "best-effort")] == [0, 1, -1]
    assert [tier_name(index, TIERS) for index in (0, 1, -1)] == ["tight", "loose", "best-effort"]
    with pytest.raises(SloServeError, match=r"tier 'snug' is not configured \(known: tight, loose, best-effort\)"):
        tier_index("snug", TIERS)


def test_constraints_state_times_in_milliseconds_and_name_the_tier() -> None:
    late = Constraint(ConstraintKind.HOPELESS, 0.25, 0.1, "s", tier=1, request_id="r1")
    wire = constraint_to_wire(late, TIERS)
    assert (wire.kind, wire.tier) == (types_pb2.CONSTRAINT_KIND_HOPELESS, "loose")
    assert (wire.needed, wire.available) == pytest.approx((250, 100))
    assert "250.0 ms" in wire.detail
    slow = constraint_to_wire(Constraint(ConstraintKind.TPOT, 0.06, 0.05, "s", tier=0), TIERS)
    assert slow.detail == "TPOT of tier tight: a batch would last 60.0 ms, the tier allows 50.0 ms"
    assert constraint_to_wire(FITS, TIERS) == types_pb2.Constraint()


def test_a_request_with_output_and_its_context_in_memory_decodes() -> None:
    request = an_engine_request(prompt_tokens=43, computed_tokens=42, output_tokens=3, started=True)
    found = engine_request_from_wire(request, TIERS, a_clock())
    assert isinstance(found, Decoder)
    assert found.next_deadline_s == pytest.approx(100.25)
    assert (found.tier, found.tpot_s, found.context_tokens, found.remaining_tokens) == (1, 0.1, 42, 9)


def test_a_waiting_request_is_a_prefill_due_at_its_first_token() -> None:
    found = engine_request_from_wire(an_engine_request(computed_tokens=16, started=True), TIERS, a_clock())
    assert isinstance(found, Prefill)
    assert found.deadline_s == pytest.approx(101.5)
    assert (found.remaining_tokens, found.started, found.promised) == (24, True, True)


def test_a_preempted_request_is_a_prefill_due_at_its_next_token() -> None:
    found = engine_request_from_wire(an_engine_request(output_tokens=5, computed_tokens=0), TIERS, a_clock())
    assert isinstance(found, Prefill)
    assert found.deadline_s == pytest.approx(100.25)


def test_best_effort_is_never_promised() -> None:
    found = engine_request_from_wire(an_engine_request(tier="best-effort"), TIERS, a_clock())
    assert (found.tier, found.promised) == (-1, False)


def test_every_process_picks_the_same_planner_and_one_more_moves_only_its_share() -> None:
    replicas = [f"replica-{number}" for number in range(300)]
    three, four = ["a:1", "b:1", "c:1"], ["d:1", "c:1", "a:1", "b:1"]
    before = {replica: planner_for(replica, three) for replica in replicas}
    after = {replica: planner_for(replica, four) for replica in replicas}
    moved = [replica for replica in replicas if before[replica] != after[replica]]
    assert {after[replica] for replica in moved} == {"d:1"}
    assert 40 < len(moved) < 120
    assert set(before.values()) == set(three)


def test_without_a_planner_there_is_no_answer() -> None:
    with pytest.raises(ValueError, match="no planner"):
        planner_for("replica-1", [])
