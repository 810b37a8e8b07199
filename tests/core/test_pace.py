"""Best effort steps back while promises conflict, and never starves."""

from services.core.pace import BestEffortPace


def test_best_effort_joins_every_batch_while_everybody_gets_a_promise() -> None:
    pace = BestEffortPace()
    assert all(pace.joins(0.03 * n) for n in range(100))


def test_after_a_conflict_it_joins_one_batch_in_so_many() -> None:
    pace = BestEffortPace(pressed_s=5.0, every=16)
    pace.conflict(10.0)
    joined = [pace.joins(10.0 + 0.03 * n) for n in range(160)]
    assert sum(joined) == 10
    assert not any(joined[:15])


def test_pressure_ends_after_a_while_without_conflicts() -> None:
    pace = BestEffortPace(pressed_s=5.0, every=16)
    pace.conflict(10.0)
    assert pace.pressed(14.9)
    assert not pace.pressed(15.0)
    assert pace.joins(15.0)


def test_it_never_starves_under_conflicts_without_end() -> None:
    pace = BestEffortPace(pressed_s=5.0, every=16)
    joined = 0
    for n in range(1600):
        pace.conflict(0.03 * n)
        joined += pace.joins(0.03 * n)
    assert joined == 100
