"""A request's stream: verdict first, tokens, stage ends, the report last."""

import asyncio

import pytest

from protos import admission_pb2, types_pb2
from services.admission.delivery import USUAL_LAG_S
from services.admission.tokens import ModelTokens
from services.client import Event, Finished, Reason, SloServeError, StageEnd, Tokens, Verdict, VerdictChanged
from tests.services.admission.world import BEST_EFFORT, PENDING, World, generate, ids_of, soon

STOP = types_pb2.FINISH_REASON_STOP
LENGTH = types_pb2.FINISH_REASON_LENGTH


async def test_verdict_first_then_tokens_then_the_report(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate("Return the number of items.", application="chatbot", max_tokens=16)
    events = [await anext(stream)]
    queued = await world.placed()
    ids = ids_of(tokens, "The items are counted.")
    for token_id in ids[:-1]:
        world.worker.emit(queued.request_id, [token_id])
    world.worker.emit(queued.request_id, ids[-1:], finish=STOP)
    events += [event async for event in stream]

    verdict, *middle, stage_end, finished = events
    assert isinstance(verdict, Verdict)
    assert (verdict.kind, verdict.replica_id, verdict.tpot_slo_ms) == ("ADMITTED", "w0", 100)
    assert verdict.ttft_slo_ms >= 100
    parts = [event for event in middle if isinstance(event, Tokens)]
    assert len(parts) == len(middle)
    assert [id_ for event in parts for id_ in event.ids] == ids
    assert [event.offset for event in parts] == [0, *cumulated(parts)[:-1]]
    assert "".join(event.text for event in parts) == "The items are counted."
    assert isinstance(stage_end, StageEnd)
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.output_tokens, finished.attempts) == ("STOP", len(ids), 1)
    assert finished.promised
    assert finished.stages == (stage_end.report,)
    assert finished.stages[0].met == finished.met
    assert finished.replica_id == "w0"
    assert len(finished.trace_id) == 32


def cumulated(tokens: list[Tokens]) -> list[int]:
    ends, total = [], 0
    for event in tokens:
        total += len(event.ids)
        ends.append(total)
    return ends


async def test_what_travels_in_the_queue_is_complete(world: World, tokens: ModelTokens) -> None:
    call = world.stub.Generate(generate(request_id="q-1"), timeout=30)
    await anext(aiter(call))
    queued = world.router.placed[0]
    assert queued.request_id == "q-1"
    assert (queued.attempt, queued.tenant, queued.application) == (1, "default", "chatbot")
    assert list(queued.prompt_token_ids) == tokens.encode("Return the number of items.")
    assert queued.stages[0].tier == "loose"
    assert queued.ttft_deadline_us == queued.arrival_us + round(queued.stages[0].ttft_ms * 1000 - USUAL_LAG_S * 1e6)
    assert 0 < queued.client_deadline_us - queued.arrival_us <= 30_500_000  # gRPC rounds deadlines up
    assert tuple(queued.stop_token_ids) == tokens.stop_token_ids
    assert queued.sampling.max_tokens == 32
    assert len(queued.traceparent) == 55
    assert len(queued.prompt_digest) == 64
    call.cancel()


async def test_who_ignores_the_end_of_the_turn_is_not_stopped_by_it(world: World) -> None:
    call = world.stub.Generate(generate(sampling=types_pb2.Sampling(ignore_eos=True)), timeout=30)
    await anext(aiter(call))
    [queued] = world.router.placed
    assert queued.sampling.ignore_eos
    assert not queued.stop_token_ids
    call.cancel()


async def test_stages_end_visibly_and_are_timed_from_the_stage_before(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate("Think.", application="reasoner", max_tokens=64)
    await anext(stream)
    queued = await world.placed()
    end_of_thought = tokens.token_id("</think>")
    assert end_of_thought is not None
    thought, answer = [*ids_of(tokens, "hmm"), end_of_thought], ids_of(tokens, "It is so.")
    world.worker.emit(queued.request_id, thought)
    first = [await anext(stream), await anext(stream)]
    await asyncio.sleep(0.03)
    world.worker.emit(queued.request_id, answer, finish=STOP)
    events = first + [event async for event in stream]
    assert [type(event) for event in events] == [Tokens, StageEnd, Tokens, StageEnd, Finished]
    _, think, _, said, finished = events
    assert isinstance(think, StageEnd) and isinstance(said, StageEnd) and isinstance(finished, Finished)
    assert (think.stage_index, think.report.kind, think.report.output_tokens) == (0, "THINK", len(thought))
    assert (said.stage_index, said.report.kind, said.report.output_tokens) == (1, "ANSWER", len(answer))
    assert said.report.ttft_slo_ms == 0
    assert said.report.tpot_ms >= 30 / len(answer)
    assert finished.stages == (think.report, said.report)


async def test_a_stop_string_cuts_the_text_and_the_generation(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate("Go on.", application="chatbot", stop=["STOP here"], max_tokens=64)
    await anext(stream)
    queued = await world.placed()
    for token_id in ids_of(tokens, "one two STOP here three four"):
        world.worker.emit(queued.request_id, [token_id])
    events = [event async for event in stream]
    assert text_of(events) == "one two "
    assert isinstance(events[-1], Finished) and events[-1].reason == "STOP"
    await soon(lambda: [cancel.reason for cancel in world.worker.cancels] == ["stop"])
    assert world.worker.cancels[0].attempt == 1


async def test_text_held_back_for_a_stop_string_comes_out_at_the_end(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate("Go on.", application="chatbot", stop=["STOP here"], max_tokens=64)
    await anext(stream)
    queued = await world.placed()
    world.worker.emit(queued.request_id, ids_of(tokens, "one STOP"), finish=LENGTH)
    events = [event async for event in stream]
    assert text_of(events) == "one STOP"
    assert isinstance(events[-1], Finished) and events[-1].reason == "LENGTH"


async def test_the_last_stages_own_limit_ends_the_output(world: World, tokens: ModelTokens) -> None:
    stages = [
        types_pb2.StageSpec(kind=types_pb2.STAGE_KIND_THINK, ttft_ms=500, tpot_ms=100, max_tokens=8),
        types_pb2.StageSpec(kind=types_pb2.STAGE_KIND_ANSWER, tpot_ms=100, max_tokens=3),
    ]
    call = world.stub.Generate(generate(stages=stages))
    queued = await world.placed()
    end_of_thought = tokens.token_id("</think>")
    assert end_of_thought is not None
    world.worker.emit(queued.request_id, [end_of_thought, *ids_of(tokens, "far more than three tokens of answer")])
    events = [event async for event in call]
    finished = events[-1].finished
    assert finished.reason == LENGTH
    assert [stage.output_tokens for stage in finished.stages] == [1, 3]
    await soon(lambda: len(world.worker.cancels) == 1)


async def test_a_pending_verdict_is_followed_by_its_decision(world: World, tokens: ModelTokens) -> None:
    world.router.verdict = PENDING
    stream = world.client.generate("Go on.", application="coder", max_tokens=4)
    first = await anext(stream)
    queued = await world.placed()
    decided = types_pb2.Verdict(kind=types_pb2.VERDICT_KIND_ADMITTED, replica_id="w0", tier="tight")
    world.worker.emit(queued.request_id, ids_of(tokens, "ok")[:1], verdict=decided, finish=STOP)
    events = [first, *[event async for event in stream]]
    assert [type(event) for event in events] == [Verdict, Verdict, Tokens, StageEnd, Finished]
    assert [event.kind for event in events if isinstance(event, Verdict)] == ["PENDING", "ADMITTED"]
    assert isinstance(events[-1], Finished) and events[-1].promised


async def test_a_promotion_is_told_as_a_changed_verdict(world: World, tokens: ModelTokens) -> None:
    world.router.verdict = BEST_EFFORT
    stream = world.client.generate("Go on.", application="coder", max_tokens=4)
    first = await anext(stream)
    assert isinstance(first, Verdict) and (first.kind, first.replica_id) == ("BEST_EFFORT", "")
    queued = await world.placed()
    promoted = types_pb2.Verdict(kind=types_pb2.VERDICT_KIND_ADMITTED, replica_id="w0", tier="tight")
    world.worker.emit(queued.request_id, verdict=promoted)
    changed = await anext(stream)
    assert isinstance(changed, VerdictChanged) and changed.verdict.kind == "ADMITTED"
    world.worker.emit(queued.request_id, ids_of(tokens, "ok"), finish=STOP)
    events = [event async for event in stream]
    assert isinstance(events[-1], Finished) and events[-1].promised


async def test_a_rejection_is_an_error_without_events(world: World) -> None:
    verdict = types_pb2.Verdict(kind=types_pb2.VERDICT_KIND_REJECTED)
    world.router.error = SloServeError(Reason.NO_CAPACITY, "full", retry_after_ms=750, details=(verdict,))
    call = world.stub.Generate(generate(on_infeasible=types_pb2.ON_INFEASIBLE_REJECT))
    assert await call.initial_metadata() is not None
    with pytest.raises(SloServeError) as refused:
        await anext(world.client.generate("Go on.", application="chatbot", on_infeasible="REJECT"))
    assert refused.value.reason is Reason.NO_CAPACITY
    assert refused.value.retry_after_ms is not None
    assert 750 <= refused.value.retry_after_ms <= 1000  # the second to be turned away has a later turn
    received = types_pb2.Verdict()
    assert any(detail.Unpack(received) for detail in refused.value.details)
    assert received.kind == types_pb2.VERDICT_KIND_REJECTED
    assert world.router.place_requests[-1].on_infeasible == types_pb2.ON_INFEASIBLE_REJECT
    trailers = dict(await call.trailing_metadata() or ())
    assert trailers["grpc-retry-pushback-ms"] == "750"


async def test_an_engine_failure_ends_the_stream_with_its_reason(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate("Go on.", application="chatbot")
    await anext(stream)
    queued = await world.placed()
    world.worker.emit(queued.request_id, ids_of(tokens, "so far"))
    world.worker.emit(queued.request_id, finish=types_pb2.FINISH_REASON_ERROR, error="out of blocks")
    with pytest.raises(SloServeError, match="out of blocks") as failed:
        [event async for event in stream]
    assert failed.value.reason is Reason.ENGINE_FAILED


async def test_tokens_lost_on_the_way_are_fetched(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate("Go on.", application="chatbot")
    await anext(stream)
    queued = await world.placed()
    ids = ids_of(tokens, "nothing is ever lost on the way")
    world.worker.emit(queued.request_id, ids[:2])
    world.worker.emit(queued.request_id, ids[2:4], lose=True)
    world.worker.emit(queued.request_id, ids[4:], finish=STOP)
    events = [event async for event in stream]
    assert text_of(events) == "nothing is ever lost on the way"
    assert world.worker.attaches[-1].from_token == 2


async def test_a_repeated_or_stale_chunk_changes_nothing(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate("Go on.", application="chatbot")
    await anext(stream)
    queued = await world.placed()
    ids = ids_of(tokens, "once and only once")
    output = world.worker.outputs[queued.request_id]
    world.worker.emit(queued.request_id, ids[:3])
    output.ids = []
    world.worker.emit(queued.request_id, ids[:4])
    output.attempt, output.ids = 0, []
    world.worker.emit(queued.request_id, [7, 7, 7, 7, 7, 7, 7], finish=STOP)
    output.attempt, output.ids = 1, ids[:4]
    world.worker.emit(queued.request_id, ids[4:], finish=STOP)
    events = [event async for event in stream]
    assert text_of(events) == "once and only once"


async def test_a_broken_token_stream_is_mended(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate("Go on.", application="chatbot")
    await anext(stream)
    queued = await world.placed()
    ids = ids_of(tokens, "it mends itself")
    world.worker.emit(queued.request_id, ids[:1])
    first = await anext(stream)
    world.worker.break_streams()
    world.worker.emit(queued.request_id, ids[1:], lose=True, finish=STOP)
    events = [first, *[event async for event in stream]]
    assert text_of(events) == "it mends itself"


async def test_a_worker_that_joins_later_is_heard_too(world: World, tokens: ModelTokens) -> None:
    late = await world.start_worker("w1")
    world.router.replica_id = "w1"
    stream = world.client.generate("Go on.", application="chatbot")
    await anext(stream)
    queued = world.router.placed[-1]
    await late.claim(queued)
    late.emit(queued.request_id, ids_of(tokens, "late"), finish=STOP)
    assert text_of([event async for event in stream]) == "late"


async def test_long_texts_are_served_as_well(world: World, tokens: ModelTokens) -> None:
    text = "word " * 2000
    stream = world.client.generate(text, application="summarizer")
    await anext(stream)
    assert list(world.router.placed[0].prompt_token_ids) == tokens.encode(text)


async def test_metrics_tell_offered_promised_kept_and_met(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate("Go on.", application="chatbot", max_tokens=8)
    await anext(stream)
    queued = await world.placed()
    world.worker.emit(queued.request_id, ids_of(tokens, "ok then"), finish=STOP)
    finished = [event async for event in stream][-1]
    assert isinstance(finished, Finished) and finished.met
    with pytest.raises(SloServeError):
        await anext(world.client.generate("", application="chatbot"))

    await soon(lambda: bool(world.metric("slos_serve.requests")))
    (offered,) = world.metric("slos_serve.offered")
    assert (offered.value, dict(offered.attributes)) == (1, {"slos_serve.application": "chatbot"})
    (request,) = world.metric("slos_serve.requests")
    assert dict(request.attributes) == {
        "slos_serve.application": "chatbot",
        "slos_serve.verdict": "admitted",
        "slos_serve.outcome": "finished",
        "slos_serve.met": True,
    }
    (promise,) = world.metric("slos_serve.promises")
    assert promise.attributes["slos_serve.outcome"] == "kept"
    (ttft,) = world.metric("gen_ai.server.time_to_first_token")
    assert ttft.count == 1
    assert ttft.sum == pytest.approx(finished.stages[0].ttft_ms / 1000)
    assert ttft.attributes["gen_ai.provider.name"] == "slos_serve"
    assert ttft.attributes["gen_ai.request.model"] == "tiny"
    (error,) = world.metric("slos_serve.errors")
    assert error.attributes["error.type"] == "INVALID_FIELD"
    (live,) = world.metric("slos_serve.live_requests")
    assert live.value == 0
    assert world.metric("slos_serve.clock_skew")


async def test_converse_is_not_served_yet_and_says_so(world: World) -> None:
    answer = world.stub.Converse(iter([admission_pb2.ConverseRequest()]))
    assert (await answer.code()).name == "UNIMPLEMENTED"
    assert "not served yet" in await answer.details()


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Tokens))
