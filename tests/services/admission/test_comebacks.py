"""What those turned away are told: a turn each, no faster than requests are taken."""

import random
from itertools import pairwise

import pytest
from google.protobuf import any_pb2

from protos import types_pb2
from services.admission.comebacks import Comebacks
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError


class Front:
    """Comebacks under a clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.comebacks = Comebacks(Clock(lambda: self.now_s), random.Random(1))

    def taken(self, per_s: int) -> None:
        """A second in which so many requests are taken."""
        for _ in range(per_s):
            self.now_s += 1 / per_s
            self.comebacks.taken()


def test_one_alone_is_told_what_the_plan_says() -> None:
    assert Front().comebacks.after_ms(320) == 320


def test_where_no_plan_says_when_it_is_a_second() -> None:
    assert Front().comebacks.after_ms(0) == 1000
    assert Front().comebacks.after_ms(None) == 1000


def test_a_burst_comes_back_at_the_rate_at_which_requests_are_taken() -> None:
    front = Front()
    front.taken(20)
    front.taken(20)
    delays_ms = [front.comebacks.after_ms(50) for _ in range(100)]
    apart_ms = [later - sooner for sooner, later in pairwise(delays_ms)]
    assert delays_ms[0] == 50
    assert apart_ms == pytest.approx([50.0] * 99, rel=0.03)


def test_turns_that_have_passed_are_given_to_nobody_again() -> None:
    front = Front()
    for _ in range(10):
        front.comebacks.after_ms(10)
    front.now_s += 60
    assert front.comebacks.after_ms(10) == 10


def test_where_next_to_nothing_is_taken_a_few_per_second_try() -> None:
    front = Front()
    delays_ms = [front.comebacks.after_ms(10) for _ in range(5)]
    assert delays_ms == pytest.approx([10, 260, 510, 760, 1010])


def test_no_delay_is_much_longer_than_half_a_minute_and_they_still_differ() -> None:
    front = Front()
    delays_ms = [front.comebacks.after_ms(10) for _ in range(1000)]
    assert max(delays_ms) <= 31_000
    late = delays_ms[500:]
    assert min(late) >= 15_000
    assert len({round(delay_ms) for delay_ms in late}) > 400


def test_turns_given_in_a_flood_do_not_outlast_it() -> None:
    front = Front()
    for _ in range(1000):
        front.comebacks.after_ms(10)
    for _ in range(4):
        front.taken(20)
    assert front.comebacks.after_ms(10) < 1000  # one of forty is refused


def test_the_verdict_in_the_details_says_the_same_as_the_error() -> None:
    front = Front()
    packed = any_pb2.Any()
    packed.Pack(types_pb2.Verdict(kind=types_pb2.VERDICT_KIND_REJECTED, retry_after_ms=40))
    for detail in (types_pb2.Verdict(retry_after_ms=40), packed):
        error = SloServeError(Reason.NO_CAPACITY, "full", retry_after_ms=40, details=(detail,))
        front.comebacks.pace(error)
        [verdict] = error.details
        assert isinstance(verdict, types_pb2.Verdict)
        assert verdict.retry_after_ms == error.retry_after_ms


def test_only_want_of_capacity_is_paced() -> None:
    front = Front()
    error = SloServeError(Reason.NO_REPLICA, "none", retry_after_ms=500)
    for _ in range(3):
        front.comebacks.pace(error)
    assert error.retry_after_ms == 500
