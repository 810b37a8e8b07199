"""Quotes and retry delays are true: asked again so, it fits."""

import math
from dataclasses import replace

from core_engine import Engine
from core_instances import Instance, instances
from hypothesis import HealthCheck, assume, given, settings

from services.core.admission import Policy, decide
from services.core.presets import preset
from services.core.quote import quote, retry_delay_s
from services.core.slo import Tier
from services.core.view import Decoder, PlanSettings, Prefill, ReplicaView

TIERS = (Tier("tight", 0.05), Tier("loose", 0.1), Tier("middle", 0.075))
MODEL = preset("opt-6.7b-a100").model
SETTINGS = PlanSettings()


def busy(backlog: int = 4) -> ReplicaView:
    decoders = tuple(Decoder(f"d{i}", 1, 0.1, 0.1, 300, 100) for i in range(60))
    held = tuple(Prefill(f"p{i}", 1, 1.0 + i, 0.1, 1500, output_tokens=50, promised=True) for i in range(backlog))
    return ReplicaView(0.0, MODEL, decoders, held, 6000, 7000)


def ask(deadline_s: float, prompt: int = 800, tier: int = 1) -> Prefill:
    return Prefill("q", tier, deadline_s, TIERS[tier].tpot_s, prompt, output_tokens=50, arrival_s=0.0)


def test_what_fits_is_quoted_as_fitting_now() -> None:
    answer = quote(busy(), ask(3.0), TIERS, Policy.MH, SETTINGS)
    assert answer.fits
    assert answer.earliest_s == 0.0
    assert answer.tightest_ttft_s <= 3.0
    assert answer.tightest_tpot_s == 0.05


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(instances(late=False))
def test_the_tightest_ttft_quoted_is_admitted(instance: Instance) -> None:
    candidate = replace(instance.candidates[0], computed_tokens=0, started=False)
    answer = quote(instance.view, candidate, TIERS[: candidate.tier + 1], Policy.MH, instance.settings)
    assume(math.isfinite(answer.tightest_ttft_s))
    again = replace(candidate, deadline_s=instance.view.now_s + answer.tightest_ttft_s)
    assert decide(instance.view, [again], Policy.GREEDY, instance.settings).admitted_ids == (again.id,)


def test_a_request_no_idle_replica_could_serve_is_never_going_to_fit() -> None:
    assert retry_delay_s(busy(), ask(0.05, prompt=5000), Policy.MH, SETTINGS) == math.inf


def test_what_only_the_batch_in_flight_makes_hopeless_fits_when_that_has_ended() -> None:
    view = ReplicaView(0.0, MODEL, (), (), 7000, 7000, engine_free_at_s=0.08)
    candidate = ask(0.1)  # alone it takes 80 ms, of which 20 are left
    assert not decide(view, (candidate,), settings=SETTINGS).by_id["q"].admitted
    delay_s = retry_delay_s(view, candidate, Policy.MH, SETTINGS)
    assert 0 < delay_s < 0.15
    later = replace(view, now_s=delay_s)
    again = replace(candidate, deadline_s=candidate.deadline_s + delay_s, arrival_s=delay_s)
    assert decide(later, (again,), settings=SETTINGS).by_id["q"].admitted


def test_after_the_retry_delay_it_fits_and_well_before_it_does_not() -> None:
    view = busy(backlog=6)
    view = replace(view, prefills=tuple(replace(p, deadline_s=0.95) for p in view.prefills))
    candidate = ask(0.4)
    delay_s = retry_delay_s(view, candidate, Policy.MH, SETTINGS)
    assert 0 < delay_s < 5
    engine = Engine(view, SETTINGS)
    first_fit_s = math.inf
    while engine.now_s <= delay_s:
        at_s = engine.now_s
        if decide(engine.view(), [replace(candidate, deadline_s=at_s + 0.4)]).admitted_ids:
            first_fit_s = min(first_fit_s, at_s)
        engine.step()
    later = replace(candidate, deadline_s=engine.now_s + 0.4)
    assert decide(engine.view(), [later]).admitted_ids == ("q",)
    assert first_fit_s >= 0.5 * delay_s


def test_waiting_for_memory_is_counted_in_steps_of_the_running() -> None:
    decoders = tuple(Decoder(f"d{i}", 1, 0.1, 0.1, 300, 20 + 20 * i) for i in range(10))
    view = ReplicaView(0.0, MODEL, decoders, (), 10, 200)
    delay_s = retry_delay_s(view, ask(1.0), Policy.MH, SETTINGS)
    assert 20 * 0.025 <= delay_s <= 200 * 0.1
