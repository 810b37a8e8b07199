"""Order, ageing, pulling and handing back of best-effort work."""

import math

import pytest

from services.core.best_effort import BestEffortEntry, may_pull, order_entries, to_hand_back


def entry(name: str, waited_s: float, tokens: int = 100, deadline_s: float = math.inf, **fields) -> BestEffortEntry:
    return BestEffortEntry(name, 100.0 - waited_s, tokens, deadline_s, **fields)


def order(*entries: BestEffortEntry) -> list[str]:
    return [e.id for e in order_entries(entries, 100.0, prefill_s_per_token=1e-4)]


def test_older_requests_come_first_and_short_ones_a_little_earlier() -> None:
    assert order(entry("new", 1.0), entry("old", 5.0)) == ["old", "new"]
    assert order(entry("long", 2.0, 4000), entry("short", 1.0, 50)) == ["short", "long"]


def test_a_long_request_does_not_starve() -> None:
    newcomers = [entry(f"short{i}", 0.1, 10) for i in range(20)]
    assert order(*newcomers, entry("long", 9.0, 8000))[0] == "long"


def test_what_can_still_meet_its_slo_goes_first_by_deadline() -> None:
    entries = (entry("old", 50.0), entry("b", 1.0, deadline_s=102.0), entry("a", 0.5, deadline_s=101.0))
    assert order(*entries, entry("lost", 3.0, 20_000, deadline_s=100.5)) == ["a", "b", "old", "lost"]


@pytest.mark.parametrize(
    ("unprefilled", "free_blocks", "expected"), [(0, 100, True), (2000, 100, False), (1999, 100, True), (0, 62, False)]
)
def test_workers_pull_while_two_batches_and_memory_allow(unprefilled: int, free_blocks: int, expected: bool) -> None:
    pulled = may_pull(
        unprefilled_tokens=unprefilled,
        batch_tokens=1000,
        prompt_tokens=1000,
        forecast_free_blocks=free_blocks,
        block_size=16,
    )
    assert pulled is expected


def test_the_newest_unstarted_entries_are_handed_back_until_there_is_room() -> None:
    entries = [entry("old", 9.0, 160), entry("new", 1.0, 160), entry("newest", 0.5, 160, started=True)]
    assert to_hand_back(entries, 10, 16) == ["new"]
    assert to_hand_back(entries, 11, 16) == ["new", "old"]
    assert to_hand_back(entries, 0, 16) == []
