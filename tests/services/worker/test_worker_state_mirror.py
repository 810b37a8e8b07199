import math
from dataclasses import replace

from protos import planner_pb2
from services.common.clock import Clock
from services.core.perf_model import PerfModel, Segment
from services.worker.state_mirror import StateMirror
from tests.services.worker.scripted_engine import INFO, MODEL
from tests.services.worker.test_worker_room import BUSY, progress_of

CLOCK = Clock(lambda: 100.0, lambda: 1000.0)


def a_mirror() -> StateMirror:
    return StateMirror("w0", INFO, MODEL, CLOCK)


def ids(state: planner_pb2.ReplicaState) -> list[str]:
    return sorted(request.request_id for request in state.requests)


def test_before_the_first_report_the_replica_is_empty() -> None:
    state = a_mirror().message(full=True)
    assert (state.seq, state.full, state.free_blocks, state.total_blocks) == (1, True, 100, 100)
    assert state.observed_at_us == 1_000_000_000
    assert state.perf_model.segments[0].b == MODEL.segments[0].b


def test_reports_between_two_messages_are_merged() -> None:
    mirror = a_mirror()
    mirror.message(full=True)
    mirror.apply(replace(BUSY, requests=(progress_of("a"), progress_of("b"))))
    mirror.apply(replace(BUSY, step=2, removed_ids=("a",), free_blocks=7))
    state = mirror.message(full=False)
    assert (ids(state), list(state.removed_ids), state.step, state.free_blocks) == (["b"], ["a"], 2, 7)
    assert not state.HasField("perf_model")
    assert ids(mirror.message(full=False)) == []


def test_a_snapshot_has_everything_and_drops_what_a_full_report_left_out() -> None:
    mirror = a_mirror()
    mirror.apply(replace(BUSY, requests=(progress_of("a"), progress_of("b"))))
    mirror.message(full=False)
    mirror.apply(replace(BUSY, full=True, requests=(progress_of("b"),)))
    delta = mirror.message(full=False)
    assert (ids(delta), list(delta.removed_ids)) == (["b"], ["a"])
    snapshot = mirror.message(full=True)
    assert (ids(snapshot), list(snapshot.removed_ids)) == (["b"], [])


def test_a_request_that_comes_back_is_not_removed() -> None:
    mirror = a_mirror()
    mirror.apply(replace(BUSY, requests=(progress_of("a"),)))
    mirror.apply(replace(BUSY, removed_ids=("a",)))
    mirror.apply(replace(BUSY, requests=(progress_of("a"),)))
    state = mirror.message(full=False)
    assert (ids(state), list(state.removed_ids)) == (["a"], [])


def test_a_changed_model_travels_once() -> None:
    mirror = a_mirror()
    mirror.message(full=True)
    mirror.apply(replace(BUSY, perf_model=PerfModel((Segment(2e-4),))))
    assert mirror.message(full=False).perf_model.segments[0].k_tok == 2e-4
    assert not mirror.message(full=False).HasField("perf_model")


def test_drafts_travel_when_everything_does_and_when_they_changed() -> None:
    mirror = StateMirror("w0", replace(INFO, max_verify_tokens=6), MODEL, CLOCK)
    first = mirror.message(full=True).drafts
    assert (first.max_verify_tokens, dict(first.acceptance)) == (6, {})
    mirror.apply(BUSY)
    assert not mirror.message(full=False).HasField("drafts")
    mirror.apply(replace(BUSY, acceptance={"coder": 0.7}))
    mirror.apply(replace(BUSY, step=2))  # merged into one message with the report before
    changed = mirror.message(full=False).drafts
    assert (changed.max_verify_tokens, dict(changed.acceptance)) == (6, {"coder": 0.7})
    assert not mirror.message(full=False).HasField("drafts")
    assert dict(mirror.message(full=True).drafts.acceptance) == {"coder": 0.7}


def test_an_engine_without_drafts_says_so() -> None:
    assert a_mirror().message(full=True).drafts.max_verify_tokens == 1


def test_a_request_without_deadlines_has_none_on_the_wire() -> None:
    mirror = a_mirror()
    mirror.apply(replace(BUSY, requests=(replace(progress_of("a"), ttft_deadline_s=math.inf),)))
    assert mirror.message(full=False).requests[0].ttft_deadline_us == 0
