"""The order in which replicas are asked."""

from collections import Counter
from dataclasses import replace

import pytest

from services.core.placement import (
    OrderName,
    PlacementRequest,
    ReplicaLoad,
    fullest_first,
    least_loaded,
    order_of,
    order_replicas,
    power_of_two,
    round_robin,
    within_budget,
)

REQUEST = PlacementRequest(prompt_tokens=800, output_tokens=200, ttft_s=1.0)


def load(name: str, used: int = 100, running: int = 10, queued_s: float = 0.1, draining: bool = False) -> ReplicaLoad:
    return ReplicaLoad(name, running, 256, used, 1000, 16, queued_s, draining)


def test_the_fullest_that_may_still_take_it_comes_first() -> None:
    loads = [load("idle", 0, 0), load("half", 500), load("nearly", 900), load("full", 990)]
    assert order_replicas(REQUEST, loads) == ["nearly", "half", "idle", "full"]


def test_the_session_comes_before_the_prefix_and_the_prefix_before_fullness() -> None:
    request = replace(REQUEST, session_replica="idle", cached_prefix_tokens={"half": 512, "third": 448})
    loads = [load("nearly", 900), load("third", 300), load("half", 500), load("idle", 0, 0), load("other", 700)]
    assert order_replicas(request, loads) == ["idle", "half", "third", "nearly", "other"]


def test_a_prefix_of_less_than_half_the_prompt_does_not_unbalance_the_fleet() -> None:
    request = replace(REQUEST, cached_prefix_tokens={"half": 399})
    assert order_replicas(request, [load("nearly", 900), load("half", 500)]) == ["nearly", "half"]


def test_a_prefix_on_a_replica_without_room_does_not_count() -> None:
    request = replace(REQUEST, cached_prefix_tokens={"full": 800})
    assert order_replicas(request, [load("full", 990), load("half", 500)]) == ["half", "full"]


def test_a_backlog_longer_than_the_ttft_or_no_seat_sends_a_replica_to_the_end() -> None:
    loads = [load("backlog", 500, queued_s=2.0), load("seats", 100, running=256), load("fine", 50)]
    assert order_replicas(REQUEST, loads)[0] == "fine"


def test_hardware_too_slow_for_the_ttft_is_asked_after_what_is_fast_enough() -> None:
    loads = [replace(load("slow", 900), prefill_s=1.2), replace(load("fast", 100), prefill_s=0.4)]
    assert order_replicas(REQUEST, loads) == ["fast", "slow"]


def test_who_has_just_declined_is_asked_last() -> None:
    assert order_replicas(REQUEST, [replace(load("a", 900), declined=True), load("b")]) == ["b", "a"]


def test_draining_replicas_are_not_asked() -> None:
    assert order_replicas(REQUEST, [load("a", draining=True), load("b")]) == ["b"]
    assert order_replicas(REQUEST, []) == []


def test_equal_replicas_come_in_a_stable_order() -> None:
    assert order_replicas(REQUEST, [load("b"), load("a"), load("c")]) == ["a", "b", "c"]


LOADS = [load("a", 300, queued_s=0.2), load("b", 600, queued_s=0.1), load("c", 100, queued_s=0.1)]


def test_the_other_orders_are_what_their_names_say() -> None:
    assert fullest_first(LOADS) == ["b", "a", "c"]
    assert least_loaded(LOADS) == ["c", "b", "a"]
    assert [round_robin(LOADS, turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
    assert round_robin(LOADS, 1) == ["b", "c", "a"]


def test_power_of_two_takes_the_less_loaded_of_two_at_random() -> None:
    first = Counter(power_of_two(LOADS, turn)[0] for turn in range(3000))
    # of the three pairs, c wins both of its own and b the third; a, the most loaded, never comes first
    assert set(first) == {"b", "c"}
    assert first["c"] / 3000 == pytest.approx(2 / 3, abs=0.05)
    assert power_of_two(LOADS, 7) == power_of_two(LOADS, 7)


@pytest.mark.parametrize("name", list(OrderName))
def test_every_order_names_every_replica_once(name: OrderName) -> None:
    order = order_of(name)
    for turn in range(5):
        assert sorted(order(LOADS, turn)) == ["a", "b", "c"]
        assert order(LOADS[:1], turn) == ["a"]
        assert order([], turn) == []


@pytest.mark.parametrize("name", list(OrderName))
def test_affinity_comes_before_every_order(name: OrderName) -> None:
    request = replace(REQUEST, session_replica="a", cached_prefix_tokens={"c": 800})
    assert order_replicas(request, LOADS, order_of(name), 3) == ["a", "c", "b"]


def test_a_budget_spends_its_last_question_on_the_least_loaded() -> None:
    loads = [load(f"r{used}", used) for used in (900, 800, 700, 600, 0)]
    order = order_replicas(REQUEST, loads)
    assert within_budget(order, loads, 3) == ["r900", "r800", "r0"]
    assert within_budget(order, loads, 1) == ["r0"]
    assert within_budget(order, loads, 5) == order
