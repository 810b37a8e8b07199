"""When answers become promises, floors under applications, and the duration cap."""

import pytest

from services.core.admission import Decision
from services.core.constraint import FITS, Constraint, ConstraintKind
from services.core.duration_cap import DurationCap
from services.core.floors import FLOOR_WEIGHT, AttainmentFloors
from services.core.presets import preset
from services.core.slo import VerdictMode
from services.core.verdict import VerdictKind, displaces, verdict_for
from services.core.view import Prefill

HOPELESS = Constraint(ConstraintKind.HOPELESS)
NO_ROOM = Constraint(ConstraintKind.PREFILL_BUDGET)


def verdict(mode: VerdictMode, *, prompt: int, constraint: Constraint = FITS, **fields) -> VerdictKind:
    starting = fields.pop("starting", False)
    request = Prefill("r", 0, 1.0, 0.05, prompt, **fields)
    decision = Decision("r", constraint is FITS, 0.5, 0.5, 0.05, constraint)
    return verdict_for(mode, request, decision, starting=starting)


def test_early_promises_cheap_prompts_on_arrival_and_the_rest_at_the_start_of_prefill() -> None:
    assert verdict(VerdictMode.EARLY, prompt=900) is VerdictKind.ADMITTED
    assert verdict(VerdictMode.EARLY, prompt=1100) is VerdictKind.PENDING
    assert verdict(VerdictMode.EARLY, prompt=1100, starting=True) is VerdictKind.ADMITTED


def test_late_waits_and_firm_decides_at_once() -> None:
    assert verdict(VerdictMode.LATE, prompt=10) is VerdictKind.PENDING
    assert verdict(VerdictMode.FIRM, prompt=5000) is VerdictKind.ADMITTED
    assert verdict(VerdictMode.FIRM, prompt=5000, constraint=NO_ROOM) is VerdictKind.DECLINED


@pytest.mark.parametrize("mode", list(VerdictMode))
def test_hopeless_is_declined_and_a_promise_is_kept_in_every_mode(mode: VerdictMode) -> None:
    assert verdict(mode, prompt=10, constraint=HOPELESS) is VerdictKind.DECLINED
    assert verdict(mode, prompt=10, constraint=HOPELESS, promised=True) is VerdictKind.ADMITTED


def test_what_has_no_room_now_stays_pending() -> None:
    assert verdict(VerdictMode.EARLY, prompt=10, constraint=NO_ROOM) is VerdictKind.PENDING


def decided(name: str, constraint: Constraint = FITS) -> Decision:
    return Decision(name, constraint is FITS, 0.5, 0.5, 0.05, constraint)


@pytest.mark.parametrize(
    ("others", "displaced"),
    [((), False), ((FITS,), False), ((FITS, NO_ROOM), True), ((HOPELESS,), False)],
)
def test_a_candidate_displaces_what_might_have_been_held_without_it(others, displaced) -> None:
    decisions = [decided("new", NO_ROOM), *(decided(f"r{n}", constraint) for n, constraint in enumerate(others))]
    assert displaces(decisions, {"new"}) is displaced


def test_an_application_under_its_floor_weighs_ten_times_until_it_recovers() -> None:
    floors = AttainmentFloors(floor=0.85, memory=20)
    for _ in range(10):
        floors.observe("coder", False)
        floors.observe("chatbot", True)
    assert floors.weight("coder", 2) == 2 * FLOOR_WEIGHT
    assert floors.weight("chatbot") == 1
    for _ in range(60):
        floors.observe("coder", True)
    assert floors.weight("coder") == 1
    assert floors.weight("new") == 1


def test_the_cap_follows_how_long_one_in_ten_can_wait_and_the_batches_in_flight() -> None:
    cap, model = DurationCap(window_s=10.0), preset("opt-6.7b-a100").model
    fixed_s = 0.0248
    for patience_s in (0.3, 0.12, 0.5):
        cap.asked(1.0, patience_s)
    assert cap.caps_s(3.0, model)[0] == pytest.approx(4.75 * fixed_s)  # 0.12 s, down to a quarter of a fixed cost
    assert cap.caps_s(3.0, model, batches_in_flight=2)[0] == pytest.approx(2.5 * fixed_s)
    assert list(cap.caps_s(3.0, model)) == sorted(cap.caps_s(3.0, model))
    for _ in range(17):
        cap.asked(4.0, 0.5)
    assert cap.caps_s(4.0, model)[0] == pytest.approx(0.2)  # one of twenty is not one in ten
    cap.asked(8.0, 0.01)
    assert cap.caps_s(10.9, model)[0] == pytest.approx(0.2)
    assert cap.caps_s(11.5, model)[0] == pytest.approx(0.2)
    assert cap.caps_s(14.5, model)[0] == pytest.approx(2.5 * fixed_s)  # it alone is remembered
    assert cap.caps_s(18.5, model)[0] == pytest.approx(0.1)  # nobody is


def test_the_cap_remembers_the_latest_however_many_ask() -> None:
    cap, model = DurationCap(), preset("opt-6.7b-a100").model
    for _ in range(1000):
        cap.asked(0.0, 0.07)
    for _ in range(240):
        cap.asked(1.0, 0.5)
    assert cap.caps_s(1.0, model)[0] == pytest.approx(0.2)


def test_the_cap_scales_with_the_fixed_cost_and_lapses_without_promises() -> None:
    cap, slow = DurationCap(lapse_s=5.0), preset("opt-30b-a100").model
    assert cap.caps_s(0.0, slow)[0] == pytest.approx(4 * 0.0379)
    cap.asked(0.0, 0.05)
    assert cap.caps_s(0.0, slow)[0] == pytest.approx(2.5 * 0.0379)
    assert cap.lapsed(0.0)
    cap.promised(0.0)
    assert not cap.lapsed(5.0)
    assert cap.lapsed(5.1)
