"""The typed client against a scripted front door."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from protos import admission_pb2, types_pb2
from services.client import (
    Constraint,
    Finished,
    InvalidRequestError,
    Reason,
    SlosClient,
    SloServeError,
    Stage,
    StageEnd,
    Tokens,
    Verdict,
    VerdictChanged,
)
from services.common.errors import FieldViolation
from tests.services.client.conftest import ScriptedAdmission, broken

Events = AsyncIterator[admission_pb2.GenerateEvent]
REPORT = admission_pb2.StageReport(
    kind=types_pb2.STAGE_KIND_ANSWER, ttft_slo_ms=500, ttft_ms=20, tpot_slo_ms=100, tpot_ms=9, output_tokens=2, met=True
)
VERDICT = types_pb2.Verdict(
    kind=types_pb2.VERDICT_KIND_BEST_EFFORT,
    tier="best-effort",
    ttft_slo_ms=500,
    constraint=types_pb2.Constraint(
        kind=types_pb2.CONSTRAINT_KIND_KV_BLOCKS, needed=9, available=3, detail="KV memory is short"
    ),
)


def event(**kind: Any) -> admission_pb2.GenerateEvent:
    return admission_pb2.GenerateEvent(request_id="x", **kind)


def tokens(offset: int, *ids: int) -> admission_pb2.GenerateEvent:
    return event(tokens=admission_pb2.Tokens(text=f"{offset}.", ids=ids, offset=offset))


FINISHED = event(
    finished=admission_pb2.Finished(
        reason=types_pb2.FINISH_REASON_STOP,
        prompt_tokens=3,
        output_tokens=2,
        stages=[REPORT],
        met=True,
        promised=True,
        replica_id="w0",
        trace_id="ab" * 16,
        attempts=1,
    )
)


async def whole(request: Any, context: Any) -> Events:
    yield event(verdict=VERDICT)
    yield tokens(0, 5, 6)
    promoted = types_pb2.Verdict(kind=types_pb2.VERDICT_KIND_ADMITTED, replica_id="w0")
    yield event(verdict_changed=admission_pb2.VerdictChanged(verdict=promoted, reason="promoted"))
    yield event(stage_end=admission_pb2.StageEnd(stage_index=0, report=REPORT))
    yield FINISHED


async def test_events_are_typed(admission: ScriptedAdmission, client: SlosClient) -> None:
    admission.scripts = [whole]
    verdict, some, changed, end, finished = [e async for e in client.generate("Go.", application="chatbot")]
    assert isinstance(verdict, Verdict)
    assert verdict.constraint == Constraint("KV_BLOCKS", 9, 3, "KV memory is short")
    assert some == Tokens("0.", (5, 6), 0)
    assert isinstance(changed, VerdictChanged) and changed.verdict.constraint is None
    assert isinstance(end, StageEnd) and (end.report.kind, end.report.met) == ("ANSWER", True)
    assert isinstance(finished, Finished) and finished.stages == (end.report,)


async def test_complete_returns_text_verdict_and_report(admission: ScriptedAdmission, client: SlosClient) -> None:
    admission.scripts = [whole]
    reply = await client.complete("Go.", application="chatbot", max_tokens=2)
    assert (reply.text, reply.ids, reply.verdict.kind, reply.finished.reason) == ("0.", (5, 6), "ADMITTED", "STOP")
    assert reply.request_id == admission.asked[0].request_id != ""


async def test_options_reach_the_wire(admission: ScriptedAdmission, client: SlosClient) -> None:
    admission.scripts = [whole]
    await client.complete(
        [1, 2, 3],
        stages=[Stage(kind="THINK", ttft_slowdown=3, tpot_ms=50, max_tokens=9), Stage(tpot_ms=100)],
        temperature=0.0,
        stop=["END"],
        on_infeasible="REJECT",
    )
    (asked,) = admission.asked
    assert list(asked.token_ids.ids) == [1, 2, 3]
    assert [types_pb2.StageKind.Name(stage.kind) for stage in asked.stages] == ["STAGE_KIND_THINK", "STAGE_KIND_ANSWER"]
    assert (asked.stages[0].WhichOneof("ttft"), asked.stages[1].WhichOneof("ttft")) == ("ttft_slowdown", None)
    assert asked.sampling.HasField("temperature") and not asked.sampling.HasField("top_p")
    assert asked.on_infeasible == types_pb2.ON_INFEASIBLE_REJECT
    assert admission.metadata[0]["authorization"] == "Bearer some-key"


async def test_errors_are_typed(admission: ScriptedAdmission, client: SlosClient) -> None:
    async def refuse(request: Any, context: Any) -> Events:
        raise InvalidRequestError(FieldViolation("text", "the prompt is empty"))
        yield

    async def full(request: Any, context: Any) -> Events:
        raise SloServeError(Reason.NO_CAPACITY, "full", retry_after_ms=250)
        yield

    admission.scripts = [refuse, full]
    with pytest.raises(InvalidRequestError) as invalid:
        await client.complete("")
    assert invalid.value.violations == (FieldViolation("text", "the prompt is empty"),)
    with pytest.raises(SloServeError) as shed:
        await client.complete("x")
    assert (shed.value.reason, shed.value.retry_after_ms) == (Reason.NO_CAPACITY, 250)


async def test_nobody_there_is_unavailable() -> None:
    async with SlosClient("127.0.0.1:1") as client:
        with pytest.raises(SloServeError) as absent:
            await client.complete("x", application="chatbot")
    assert absent.value.reason is Reason.ADMISSION_UNAVAILABLE


async def test_leaving_the_loop_cancels_the_call(admission: ScriptedAdmission, client: SlosClient) -> None:
    waiting = asyncio.Event()

    async def endless(request: Any, context: Any) -> Events:
        yield event(verdict=VERDICT)
        await waiting.wait()

    admission.scripts = [endless]
    stream = client.generate("Go.", application="chatbot")
    await anext(stream)
    await stream.aclose()
    async with asyncio.timeout(10):
        while not admission.ended:  # noqa: ASYNC110 - state of the other end
            await asyncio.sleep(0.005)


async def test_a_broken_stream_is_resumed_within_its_grace(admission: ScriptedAdmission, client: SlosClient) -> None:
    async def breaks(request: Any, context: Any) -> Events:
        yield event(verdict=VERDICT)
        yield tokens(0, 5, 6)
        await broken(context)

    async def not_yet(request: Any, context: Any) -> Events:
        await broken(context)
        yield

    async def goes_on(request: Any, context: Any) -> Events:
        yield event(verdict=VERDICT)
        yield tokens(2, 7)
        yield FINISHED

    admission.scripts = [breaks, not_yet, goes_on]
    reply = await client.complete("Go.", application="chatbot", resume_grace_s=10)
    assert (reply.text, reply.ids) == ("0.2.", (5, 6, 7))
    first, *resumes = admission.asked
    assert [(resume.request_id, resume.from_token) for resume in resumes] == [(first.request_id, 2)] * 2


async def test_a_broken_stream_without_grace_is_an_error(admission: ScriptedAdmission, client: SlosClient) -> None:
    async def breaks(request: Any, context: Any) -> Events:
        yield event(verdict=VERDICT)
        await broken(context)

    admission.scripts = [breaks]
    with pytest.raises(SloServeError) as lost:
        await client.complete("Go.", application="chatbot")
    assert lost.value.reason is Reason.ADMISSION_UNAVAILABLE
    assert len(admission.asked) == 1


async def test_a_deadline_is_kept_over_resumes(admission: ScriptedAdmission, client: SlosClient) -> None:
    async def hangs(request: Any, context: Any) -> Events:
        yield event(verdict=VERDICT)
        await asyncio.Event().wait()

    admission.scripts = [hangs]
    with pytest.raises(SloServeError) as late:
        await client.complete("Go.", application="chatbot", resume_grace_s=10, timeout_s=0.3)
    assert late.value.reason is Reason.CLIENT_DEADLINE


async def test_cancel(admission: ScriptedAdmission, client: SlosClient) -> None:
    assert await client.cancel("x-1") is True
    assert admission.asked[0].request_id == "x-1"
