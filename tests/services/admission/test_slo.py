"""SLOs resolved against the fleet, and refused where no idle replica could meet them."""

import pytest

from services.admission.auth import Caller, check_permitted
from services.admission.slo import ReplicaSpeed, resolve_stages, stage_tiers
from services.common.config import Tenant
from services.common.errors import Reason, SloServeError
from services.core.perf_model import PerfModel, Segment
from services.core.slo import StageKind, StageSlo, Tier

FAST = ReplicaSpeed("fast", PerfModel((Segment(k_tok=1e-4, b=0.010),)))
SLOW = ReplicaSpeed("slow", PerfModel((Segment(k_tok=1e-3, b=0.040),)))
TIERS = (Tier("tight", 0.05), Tier("loose", 0.1))


def answer(ttft_s: float | None = None, slowdown: float | None = None, tpot_s: float = 0.1) -> StageSlo:
    return StageSlo(StageKind.ANSWER, ttft_s, slowdown, tpot_s, 100)


def test_a_slowdown_counts_from_the_fastest_live_replica() -> None:
    (stage,) = resolve_stages([answer(slowdown=5)], 1000, [SLOW, FAST], floor_s=0.1)
    assert stage.ttft_s == pytest.approx(5 * 0.110)
    assert stage.ttft_slowdown is None


def test_a_slowdown_never_goes_below_the_floor() -> None:
    (stage,) = resolve_stages([answer(slowdown=2)], 10, [FAST], floor_s=0.1)
    assert stage.ttft_s == 0.1


def test_no_replica_is_unavailable_with_a_delay() -> None:
    with pytest.raises(SloServeError) as refused:
        resolve_stages([answer(slowdown=2)], 10, [], floor_s=0.1)
    assert refused.value.reason is Reason.NO_REPLICA
    assert refused.value.retry_after_ms


@pytest.mark.parametrize(
    ("stage", "numbers"),
    [
        (answer(ttft_s=0.05), ["TTFT 50 ms", "fast", "110.0 ms"]),
        (answer(ttft_s=1, tpot_s=0.005), ["TPOT 5 ms", "fast", "10.1 ms"]),
    ],
)
def test_what_no_idle_replica_could_do_is_refused_with_numbers(stage: StageSlo, numbers: list[str]) -> None:
    with pytest.raises(SloServeError) as refused:
        resolve_stages([stage], 1000, [FAST, SLOW], floor_s=0.1)
    assert refused.value.reason is Reason.SLO_IMPOSSIBLE
    assert all(number in refused.value.text for number in numbers)


def test_one_replica_must_meet_everything() -> None:
    prefiller = ReplicaSpeed("prefiller", PerfModel((Segment(k_tok=1e-6, b=0.08),)))
    decoder = ReplicaSpeed("decoder", PerfModel((Segment(k_tok=1e-2, b=0.001),)))
    with pytest.raises(SloServeError, match="no single replica"):
        resolve_stages([answer(ttft_s=0.2, tpot_s=0.05)], 1000, [prefiller, decoder], floor_s=0.1)


def test_a_stage_belongs_to_the_loosest_tier_that_meets_it() -> None:
    assert stage_tiers([answer(1, tpot_s=0.07), answer(1, tpot_s=0.5)], TIERS) == ("tight", "loose")


def test_tighter_than_every_tier_is_refused() -> None:
    with pytest.raises(SloServeError, match=r"stages\[1\]\.tpot_ms: .*50 ms") as refused:
        stage_tiers([answer(1), answer(1, tpot_s=0.03)], TIERS)
    assert refused.value.reason is Reason.SLO_IMPOSSIBLE


@pytest.mark.parametrize(("limits", "field"), [({"min_tpot_ms": 200.0}, "tpot_ms"), ({"min_ttft_ms": 800.0}, "ttft")])
def test_tighter_than_the_tenant_may_ask_is_not_permitted(limits: dict[str, float], field: str) -> None:
    check_permitted(Caller("free", Tenant()), [answer(0.5)])
    with pytest.raises(SloServeError, match=field) as refused:
        check_permitted(Caller("free", Tenant(**limits)), [answer(0.5)])
    assert refused.value.reason is Reason.SLO_NOT_PERMITTED
