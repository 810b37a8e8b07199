"""When a fleet grows and when it shrinks."""

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from services.core.scaling import FleetSample, ScalingPolicy, ScalingState, decide_scale

POLICY = ScalingPolicy(min_replicas=1, max_replicas=6, out_after_s=3.0, in_after_s=30.0)


def run(state: ScalingState, seconds: int, policy: ScalingPolicy = POLICY, **fields: float) -> tuple[ScalingState, int]:
    """A sample a second; the state at the end and how often the answer changed. Replicas are ready at once."""
    changes, begin_s = 0, 0.0 if state.at_s < 0 else state.at_s
    for second in range(1, seconds + 1):
        values = {"ready": state.desired, "starting": 0, "offered": 10, "declined": 0, "idle": 0.0, **fields}
        after = decide_scale(state, FleetSample(at_s=begin_s + second, **values), policy)
        changes += after.desired != state.desired
        state = after
    return state, changes


def test_lasting_declines_add_a_replica_and_a_short_burst_does_not() -> None:
    state, _ = run(ScalingState(2), 3, declined=3)
    assert state.desired == 2
    state, _ = run(state, 2, declined=3)
    assert state.desired == 3


def test_the_step_out_follows_the_share_that_was_declined() -> None:
    state, changes = run(ScalingState(4), 5, replace(POLICY, max_replicas=100), declined=5)
    assert (state.desired, changes) == (6, 1)


def test_replicas_that_are_starting_are_waited_for() -> None:
    state, changes = run(ScalingState(2), 60, declined=5, starting=1)
    assert (state.desired, changes) == (2, 0)


def test_a_replica_that_finds_no_node_is_given_up_where_others_stand_idle() -> None:
    state, _ = run(ScalingState(4), 33, ready=3, starting=1, idle=2.0)
    assert state.desired == 3


def test_idle_replicas_are_removed_one_by_one_after_a_while() -> None:
    state, changes = run(ScalingState(4), 29, idle=2.5)
    assert changes == 0
    state, changes = run(state, 5, idle=2.5)
    assert (state.desired, changes) == (3, 1)
    state, changes = run(state, 28, idle=2.5)
    assert changes == 0  # the wait begins anew


def test_one_replica_that_idles_is_kept_for_the_next_burst() -> None:
    state, _ = run(ScalingState(3), 500, idle=1.0)
    assert state.desired == 3


def test_waiting_best_effort_keeps_idle_looking_replicas() -> None:
    state, _ = run(ScalingState(3), 500, idle=2.0, waiting=1)
    assert state.desired == 3


def test_an_unused_fleet_shrinks_to_its_minimum() -> None:
    state, _ = run(ScalingState(5), 1000, offered=0, idle=5.0)
    assert state.desired == 1


def test_few_requests_say_nothing_about_the_decline_rate() -> None:
    state, _ = run(ScalingState(1), 20, offered=0, declined=0)
    state = decide_scale(state, FleetSample(state.at_s + 1, 1, 0, 1, 1, 0.0), POLICY)
    state, _ = run(state, 20, offered=0)
    assert state.desired == 1


def test_it_does_not_chase_itself() -> None:
    """Load that two replicas carry and one does not: out once, never in and out again."""
    state = ScalingState(1)
    answers = []
    for _ in range(600):
        declined = 4 if state.desired == 1 else 0
        idle = max(0.0, state.desired - 1.4)
        sample = FleetSample(max(0.0, state.at_s) + 1, state.desired, 0, 10, declined, idle)
        state = decide_scale(state, sample, POLICY)
        answers.append(state.desired)
    assert answers[-1] == 2
    assert sum(a != b for a, b in itertools.pairwise(answers)) <= 1


@given(
    st.integers(0, 12),
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 3), st.integers(0, 99), st.integers(0, 99), st.floats(0, 12)),
        max_size=80,
    ),
)
def test_the_answer_stays_within_its_bounds(first: int, samples: list[tuple[int, int, int, int, float]]) -> None:
    state = ScalingState(first)
    for index, (ready, starting, offered, declined, idle) in enumerate(samples):
        before = state
        state = decide_scale(state, FleetSample(5.0 * index, ready, starting, offered, declined, idle), POLICY)
        assert 1 <= state.desired <= 6
        assert 0 <= state.decline_rate <= 1
        if index:
            assert state.desired >= before.desired - 1
