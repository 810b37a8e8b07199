from dataclasses import replace

from services.worker.best_effort_room import BestEffortRoom
from services.worker.engine_api import EngineReport, RequestProgress
from tests.services.worker.scripted_engine import INFO, MODEL

BUSY = EngineReport(
    step=1,
    observed_at_s=0.0,
    full=False,
    requests=(),
    removed_ids=(),
    free_blocks=10,
    engine_free_at_s=0.0,
    running=1,
    waiting=0,
    best_effort=0,
    best_effort_prefill_tokens=0,
    preemptions=0,
    token_budget=100,
)


def progress_of(request_id: str) -> RequestProgress:
    return RequestProgress(request_id, 1, "", "loose", True, True, 1, 1, 0, 1, 1, 0.0, 0.0, 0.1)


def a_room(report: EngineReport = BUSY) -> BestEffortRoom:
    room = BestEffortRoom(INFO, MODEL)
    room.apply(report)
    return room


def test_an_engine_that_has_reported_nothing_takes_one_request() -> None:
    room = BestEffortRoom(INFO, MODEL)
    assert room.fits(10_000)
    room.submitted("a", 100_000, best_effort=True)
    assert not room.fits()


def test_an_idle_engine_takes_any_prompt() -> None:
    assert a_room(replace(BUSY, running=0, free_blocks=0)).fits(10_000)


def test_a_prompt_must_fit_the_free_blocks() -> None:
    room = a_room()
    assert room.fits(159)
    assert not room.fits(160)


def test_two_batches_of_unprefilled_best_effort_are_enough() -> None:
    assert a_room(replace(BUSY, best_effort_prefill_tokens=199)).fits()
    assert not a_room(replace(BUSY, best_effort_prefill_tokens=200)).fits()


def test_what_the_scheduler_has_not_reported_yet_counts_too() -> None:
    room = a_room()
    room.submitted("promised", 150, best_effort=False)
    assert not room.fits()
    room.apply(replace(BUSY, requests=(progress_of("promised"),)))
    assert room.fits()


def test_an_engine_without_best_effort_for_too_long_takes_one_request() -> None:
    now_s = 100.0
    room = BestEffortRoom(INFO, MODEL, patience_s=30.0, now_s=lambda: now_s)
    room.apply(replace(BUSY, free_blocks=0))
    now_s += 29
    assert not room.fits(500)
    now_s += 2
    assert room.fits(500)
    room.submitted("old", 500, best_effort=True)
    assert not room.fits(500)
    room.apply(replace(BUSY, free_blocks=0, best_effort=1, requests=(progress_of("old"),)))
    now_s += 29
    assert not room.fits(500)


def test_what_left_before_it_was_reported_counts_no_more() -> None:
    room = a_room()
    room.submitted("a", 300, best_effort=True)
    assert not room.fits()
    room.ended("a")
    assert room.fits()
