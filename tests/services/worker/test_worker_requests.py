"""What happens to requests in a worker: real Redis, real gRPC, a scripted engine."""

import asyncio
import math

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from protos import types_pb2, worker_pb2
from services.common.keys import BEST_EFFORT_QUEUE
from services.common.request_record import RequestState
from services.core.constraint import Constraint, ConstraintKind
from services.core.perf_model import BatchShape
from services.core.slo import StageKind
from services.worker.engine_api import RequestDecision
from tests.services.worker.worker_world import World, eventually


async def test_a_request_runs_from_its_queue_to_its_recorded_end(world: World, unique: str) -> None:
    await world.submit(world.request(unique))
    await world.engine.until_running(unique)
    assert (await world.record(unique)).state is RequestState.CLAIMED
    world.engine.step()
    assert await world.listener.tokens(unique, 1) == [1000]
    await world.until_recorded(unique, state="running")
    world.engine.step(2)

    end = await world.listener.end(unique)
    assert end.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert world.listener.ids[unique] == [1000, 1001, 1002]
    record = await world.until_recorded(unique, state="finished", output_tokens="3")
    assert record.times_us["first_token_us"] <= record.times_us["ended_us"]
    assert await world.redis.xlen(world.queue("loose")) == 0
    assert await world.pending(world.queue("loose")) == []


async def test_the_last_token_and_the_end_share_a_chunk(world: World, unique: str) -> None:
    world.engine.scripts[unique] = [9, 2]
    await world.submit(world.request(unique, max_tokens=50))
    await world.engine.until_running(unique)
    world.engine.step(2)
    end = await world.listener.end(unique)
    assert end.finish_reason == types_pb2.FINISH_REASON_STOP
    assert end.token_ids[-1] == 2


async def test_deadlines_sampling_and_stages_reach_the_engine(world: World, unique: str) -> None:
    request = world.request(unique)
    request.sampling.temperature = 0.5
    request.sampling.seed = 7
    await world.submit(request)
    await world.engine.until_running(unique)
    submission = world.engine.running[unique].submission
    assert abs(submission.ttft_deadline_s - world.clock.to_monotonic_s(request.ttft_deadline_us)) < 1e-3
    assert submission.token_ids == (11, 12, 13, 14)
    assert (submission.sampling.temperature, submission.sampling.seed, submission.sampling.top_p) == (0.5, 7, None)
    assert [stage.kind for stage in submission.stages] == [StageKind.ANSWER]
    assert (submission.tiers, submission.promised) == (("loose",), True)


async def test_a_later_attempt_continues_after_the_delivered_tokens(world: World, unique: str) -> None:
    request = world.request(unique, max_tokens=5)
    await world.submit(request)
    await world.engine.until_running(unique)
    world.engine.step(2)
    await world.listener.tokens(unique, 2)
    await world.until_recorded(unique, state="running")

    again = world.request(unique, attempt=2, max_tokens=5, delivered_token_ids=[1000, 1001])
    await world.requeue(again)
    await eventually(lambda: len(world.engine.submissions) == 2)
    assert unique in world.engine.aborted  # the older attempt left first
    submission = world.engine.submissions[1]
    assert submission.token_ids == (11, 12, 13, 14, 1000, 1001)
    assert (submission.sampling.max_tokens, submission.delivered_tokens) == (3, 2)
    world.engine.step(3)
    end = await world.listener.end(unique)
    assert (end.attempt, world.listener.ids[unique]) == (2, [1000, 1001, 1002, 1003, 1004])


async def test_cancel_frees_the_engine_at_once_and_is_recorded(world: World, unique: str) -> None:
    await world.submit(world.request(unique, max_tokens=100))
    await world.engine.until_running(unique)
    world.engine.step()
    await world.listener.tokens(unique, 1)
    await world.store.cancel(unique)
    answer = await world.stub.Cancel(worker_pb2.WorkerCancelRequest(request_id=unique, reason="client"))
    assert answer.cancelled
    assert world.engine.aborted == [unique]
    assert (await world.listener.end(unique)).finish_reason == types_pb2.FINISH_REASON_CANCELLED
    record = await world.until_recorded(unique, output_tokens="1")
    assert record.state is RequestState.CANCELLED
    assert await world.redis.xlen(world.queue("loose")) == 0


async def test_a_matched_stop_string_finishes_the_request(world: World, unique: str) -> None:
    await world.submit(world.request(unique, max_tokens=100))
    await world.engine.until_running(unique)
    world.engine.step()
    await world.listener.tokens(unique, 1)
    await world.stub.Cancel(worker_pb2.WorkerCancelRequest(request_id=unique, attempt=1, reason="stop"))
    assert (await world.listener.end(unique)).finish_reason == types_pb2.FINISH_REASON_STOP
    await world.until_recorded(unique, state="finished")


async def test_cancelling_what_does_not_run_here_or_another_attempt_does_nothing(world: World, unique: str) -> None:
    assert not (await world.stub.Cancel(worker_pb2.WorkerCancelRequest(request_id="unknown"))).cancelled
    await world.submit(world.request(unique))
    await world.engine.until_running(unique)
    assert not (await world.stub.Cancel(worker_pb2.WorkerCancelRequest(request_id=unique, attempt=9))).cancelled
    assert world.engine.aborted == []


async def test_a_failed_claim_is_acknowledged_and_forgotten(world: World, unique: str) -> None:
    request = world.request(unique, tier="tight")
    await world.submit(request)
    await world.engine.until_running(unique)
    await world.redis.xadd(world.queue("tight"), {"id": unique, "v": "1", "body": request.SerializeToString()})
    follower = f"{unique}-b"
    await world.submit(world.request(follower, tier="tight"))
    await world.engine.until_running(follower)
    assert [one.request_id for one in world.engine.submissions] == [unique, follower]


async def test_an_entry_past_its_clients_deadline_is_failed_with_the_reason(world: World, unique: str) -> None:
    await world.submit(world.request(unique, client_deadline_us=world.clock.now_us() - 5000))
    end = await world.listener.end(unique)
    assert end.finish_reason == types_pb2.FINISH_REASON_ERROR
    assert "deadline passed" in end.error
    record = await world.until_recorded(unique, state="failed", error=end.error)
    assert record.fields["output_tokens"] == "0"
    assert world.engine.submissions == []


async def test_a_prompt_that_fills_the_context_is_failed_with_the_reason(world: World, unique: str) -> None:
    await world.submit(world.request(unique, prompt_token_ids=[1] * 256))
    end = await world.listener.end(unique)
    assert "context of 256" in end.error
    await world.until_recorded(unique, state="failed")


async def test_what_fails_in_the_engine_is_answered(world: World, unique: str) -> None:
    await world.submit(world.request(unique))
    await world.engine.until_running(unique)
    world.engine.fail(unique, ValueError("no such adapter"))
    end = await world.listener.end(unique)
    assert (end.finish_reason, end.error) == (types_pb2.FINISH_REASON_ERROR, "ValueError: no such adapter")
    await world.until_recorded(unique, state="failed")


async def test_best_effort_waits_in_its_queue_until_there_is_room(world: World, unique: str) -> None:
    await world.submit(world.request(unique))
    await world.engine.until_running(unique)
    world.engine.free_blocks = 0
    world.engine.step()
    await world.listener.tokens(unique, 1)
    waiting = f"{unique}-be"
    await world.submit(world.request(waiting, promised=False, tier="best-effort", prompt_token_ids=[1] * 40))
    promised = f"{unique}-p"
    await world.submit(world.request(promised))
    await world.engine.until_running(promised)  # promised requests still come
    assert (await world.record(waiting)).state is RequestState.QUEUED

    world.engine.free_blocks = 50
    world.engine.report()
    await world.engine.until_running(waiting)


async def test_a_demotion_is_told_to_the_admission_process(world: World, unique: str) -> None:
    await world.submit(world.request(unique))
    await world.engine.until_running(unique)
    short = Constraint(ConstraintKind.HOPELESS, 0.3, 0.1, "s")
    lost = RequestDecision(unique, 1, False, math.nan, math.nan, short, "loose")
    world.engine.report(demoted=(lost,))
    await eventually(lambda: world.listener.chunks.get(unique))
    (chunk,) = world.listener.chunks[unique]
    assert chunk.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_HOPELESS
    await world.until_recorded(unique, verdict="best_effort")
    assert chunk.verdict.kind == types_pb2.VERDICT_KIND_BEST_EFFORT
    assert chunk.verdict.replica_id == world.settings.replica_id


async def test_a_request_that_outlives_its_forecast_is_forecast_anew(world: World, unique: str) -> None:
    for _ in range(20):
        world.worker._forecaster.observe("chatbot", 4, 5)
    await world.submit(world.request(unique, max_tokens=200))
    await world.engine.until_running(unique)
    (submission,) = [one for one in world.engine.submissions if one.request_id == unique]
    world.engine.step(submission.forecast_tokens - 1)
    await world.listener.tokens(unique, submission.forecast_tokens - 1)
    assert world.engine.reforecasts == []
    world.engine.step()
    await eventually(lambda: world.engine.reforecasts)
    ((request_id, tokens),) = world.engine.reforecasts
    assert request_id == unique
    assert submission.forecast_tokens < tokens <= 200


async def test_a_request_placed_elsewhere_is_left_without_a_word_at_its_first_token(world: World, unique: str) -> None:
    await world.submit(world.request(unique, max_tokens=50))
    await world.engine.until_running(unique)
    await world.steal(world.request(unique, attempt=2), BEST_EFFORT_QUEUE + unique)
    world.engine.step()
    await world.engine.until_gone(unique)
    assert unique not in world.listener.ended
    assert (await world.record(unique)).state is RequestState.QUEUED


async def test_queue_prefill_and_every_stage_are_spans_of_the_requests_trace(
    world: World, unique: str, spans: InMemorySpanExporter
) -> None:
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    request = world.request(unique, max_tokens=4, traceparent=f"00-{trace_id}-{parent_id}-01")
    request.stages.insert(
        0,
        types_pb2.Stage(
            kind=types_pb2.STAGE_KIND_THINK, ttft_ms=5000, tpot_ms=50, max_tokens=99, end_token_id=77, tier="tight"
        ),
    )
    world.engine.scripts[unique] = [5, 77, 6, 7]
    await world.submit(request)
    await world.engine.until_running(unique)
    world.engine.step()
    await world.listener.tokens(unique, 1)
    world.engine.step(3)
    await world.until_recorded(unique, state="finished")

    def finished() -> dict[str, ReadableSpan]:
        ended = spans.get_finished_spans()
        return {span.name: span for span in ended if f"{span.context.trace_id:032x}" == trace_id}

    await eventually(lambda: "decode ANSWER" in finished())  # its end is recorded a moment before its span
    found = finished()
    assert set(found) == {"queue", "prefill", "decode THINK", "decode ANSWER"}
    assert {f"{span.parent.span_id:016x}" for span in found.values() if span.parent} == {parent_id}
    assert found["queue"].end_time == found["prefill"].start_time
    assert found["prefill"].end_time == found["decode THINK"].start_time
    assert found["decode THINK"].end_time == found["decode ANSWER"].start_time
    assert found["decode ANSWER"].attributes["slos_serve.output_tokens"] == 2
    assert found["decode THINK"].attributes["slos_serve.tpot_slo_ms"] == 50


async def test_status_tells_what_the_engine_is_and_does(world: World, unique: str) -> None:
    await world.submit(world.request(unique))
    await world.engine.until_running(unique)
    world.engine.step()
    await world.listener.tokens(unique, 1)
    status = await world.stub.Status(worker_pb2.StatusRequest())
    assert (status.replica_id, status.model, status.total_blocks) == (world.settings.replica_id, "scripted", 100)
    assert (status.running, status.steps, status.draining) == (1, 1, False)
    assert status.perf_model.segments[0].k_tok == 1e-4


async def test_profile_tells_what_the_model_was_fitted_to_and_what_batches_take_now(world: World) -> None:
    for number in range(600):
        world.engine.report(batches=((BatchShape(number, 1, 1), 0.5),))
    world.engine.report(batches=((BatchShape(9, 8, 7, 6, 5.0), 0.25),))

    async def last() -> worker_pb2.ProfileResponse:
        return await world.stub.Profile(worker_pb2.ProfileRequest())

    async with asyncio.timeout(10):
        while not (told := await last()).recent or told.recent[-1].seconds != 0.25:
            pass
    newest, (profiled,) = told.recent[-1], told.profiled
    assert (newest.tokens, newest.context_tokens, newest.requests, newest.draft_steps) == (9, 8, 7, 6)
    assert newest.attended == 5.0
    assert len(told.recent) == 500
    assert (told.replica_id, told.samples) == (world.settings.replica_id, 3)
    assert (profiled.tokens, profiled.draft_steps, profiled.seconds, profiled.heldout) == (7, 2, 0.011, True)
    assert told.fitted.segments[0].k_tok == told.current.segments[0].k_tok == 1e-4
