"""The order in which replicas are asked."""

from dataclasses import replace

from services.core.placement import PlacementRequest, ReplicaLoad, order_replicas

REQUEST = PlacementRequest(prompt_tokens=800, output_tokens=200, ttft_s=1.0)


def load(name: str, used: int = 100, running: int = 10, queued_s: float = 0.1, draining: bool = False) -> ReplicaLoad:
    return ReplicaLoad(name, running, 256, used, 1000, 16, queued_s, draining)


def test_the_fullest_that_may_still_take_it_comes_first() -> None:
    loads = [load("idle", 0, 0), load("half", 500), load("nearly", 900), load("full", 990)]
    assert order_replicas(REQUEST, loads) == ["nearly", "half", "idle", "full"]


def test_the_session_comes_before_the_prefix_and_the_prefix_before_fullness() -> None:
    request = replace(REQUEST, session_replica="idle", cached_prefix_tokens=(("half", 512), ("nearly", 16)))
    loads = [load("nearly", 900), load("half", 500), load("idle", 0, 0), load("other", 700)]
    assert order_replicas(request, loads) == ["idle", "half", "nearly", "other"]


def test_a_backlog_longer_than_the_ttft_or_no_seat_sends_a_replica_to_the_end() -> None:
    loads = [load("backlog", 500, queued_s=2.0), load("seats", 100, running=256), load("fine", 50)]
    assert order_replicas(REQUEST, loads)[0] == "fine"


def test_draining_replicas_are_not_asked() -> None:
    assert order_replicas(REQUEST, [load("a", draining=True), load("b")]) == ["b"]
    assert order_replicas(REQUEST, []) == []


def test_equal_replicas_come_in_a_stable_order() -> None:
    assert order_replicas(REQUEST, [load("b"), load("a"), load("c")]) == ["a", "b", "c"]
