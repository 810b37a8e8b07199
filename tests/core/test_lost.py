"""Promises that no plan can keep any more."""

import math
from dataclasses import replace

import pytest

from services.core.admission import decide
from services.core.constraint import ConstraintKind
from services.core.draft_lengths import fastest_length
from services.core.lost import lost_promises
from services.core.perf_model import PerfModel, Segment
from services.core.speculation import expected_tokens
from services.core.view import Decoder, Prefill, ReplicaView

MODEL = PerfModel((Segment(1e-4, b=0.02),), margin_s=0.001)


def view(*, decoders: tuple[Decoder, ...] = (), prefills: tuple[Prefill, ...] = ()) -> ReplicaView:
    return ReplicaView(10.0, MODEL, decoders, prefills, 10_000, 10_000)


def prefill(due_in_s: float, tokens: int = 1000, *, promised: bool = True) -> Prefill:
    return Prefill("p", 0, 10.0 + due_in_s, 0.05, tokens, output_tokens=10, promised=promised)


def decoder(due_in_s: float, remaining: int, tier: int = 0) -> Decoder:
    return Decoder("d", tier, 10.0 + due_in_s, 0.05, 100, remaining)


def test_a_prefill_is_lost_when_even_alone_it_is_late_by_more_than_the_margin() -> None:
    assert lost_promises(view(prefills=(prefill(0.1175),))) == {}  # alone it takes 0.12 s
    found = lost_promises(view(prefills=(prefill(0.116),)))["p"]
    assert found.kind is ConstraintKind.HOPELESS
    assert found.needed == pytest.approx(0.12)
    assert found.available == pytest.approx(0.116)


def test_decoders_on_tiers_take_their_part_of_that_batch() -> None:
    beside = view(decoders=tuple(replace(decoder(9.0, 5), id=f"d{i}") for i in range(50)), prefills=(prefill(0.1195),))
    assert set(lost_promises(beside)) == {"p"}


def test_only_promises_are_lost() -> None:
    assert lost_promises(view(prefills=(prefill(0.01, promised=False),))) == {}
    assert lost_promises(view(decoders=(decoder(-5.0, 3, tier=-1),))) == {}


def test_a_decoder_is_lost_when_it_cannot_catch_up_before_its_end() -> None:
    # a step takes 0.0201 s and is due every 0.05 s: ten tokens late are caught up in 17 steps
    assert set(lost_promises(view(decoders=(decoder(-0.5, 15),)))) == {"d"}
    assert lost_promises(view(decoders=(decoder(-0.5, 25),))) == {}
    assert lost_promises(view(decoders=(decoder(-0.5, 15),)), tokens_per_step=2.0) == {}
    assert lost_promises(view(decoders=(decoder(-0.5, 15),)), in_hand_s=0.1) == {}  # its promise ends 0.1 s later


def test_a_decoder_in_time_is_never_lost() -> None:
    assert lost_promises(view(decoders=(decoder(0.03, 1),))) == {}


def test_what_is_lost_was_refused_had_it_not_been_promised() -> None:
    for due_in_s in (0.05, 0.1, 0.116, 0.15):
        asked = prefill(due_in_s, promised=False)
        lost = bool(lost_promises(view(prefills=(prefill(due_in_s),))))
        admitted = decide(view(), [asked]).by_id["p"].admitted
        assert not (lost and admitted)


def test_the_fastest_length_is_the_best_of_all() -> None:
    for decoders in (1, 30, 400):
        for acceptance in (0.0, 0.5, 0.9, 1.0):

            def rate(n: int, decoders: int = decoders, acceptance: float = acceptance) -> float:
                return expected_tokens(n, acceptance) / (1e-4 * n * decoders + 0.02)

            found = fastest_length(MODEL, [decoders], [1.0], [acceptance])
            assert math.isclose(rate(found), max(map(rate, range(1, 11))))
    assert fastest_length(MODEL, [400], [1.0], [0.0]) == 1
    assert fastest_length(MODEL, [1], [1.0], [1.0]) == 10


def test_the_fastest_length_keeps_every_pace_and_fits_into_a_batch() -> None:
    plain_s = 1e-4 * 100 + 0.02
    assert fastest_length(MODEL, [0, 100], [1e-9, 1.0], [0.0, 0.9]) > 1
    assert fastest_length(MODEL, [1, 99], [1.1 * plain_s, 1.0], [0.0, 0.9]) == 1  # the first gains nothing by drafts
    assert fastest_length(MODEL, [1, 99], [0.9 * plain_s, 1.0], [0.0, 0.9]) == 0
    assert fastest_length(MODEL, [100], [1.0], [0.9], max_batch_tokens=250) == 2
