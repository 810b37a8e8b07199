"""`slosctl quote` and `slosctl explain` against a scripted front door: what is printed, and the exit status."""

import asyncio
import io
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from protos import admission_pb2, admission_pb2_grpc, types_pb2
from services.cli.answer_view import quote_view
from services.client import Quote, Verdict
from services.common.errors import Reason, SloServeError
from services.common.rpc import RpcServer

ROOT = Path(__file__).parents[3]
LIMIT = types_pb2.Constraint(
    kind=types_pb2.CONSTRAINT_KIND_PREFILL_BUDGET, needed=900, available=200, detail="prefill budget: 900 tokens wanted"
)
FULL = types_pb2.Verdict(
    kind=types_pb2.VERDICT_KIND_BEST_EFFORT, constraint=LIMIT, ttft_slo_ms=500, tpot_slo_ms=50, predicted_ttft_ms=812
)


class FrontDoor(admission_pb2_grpc.AdmissionServicer):
    def __init__(self) -> None:
        self.answer: Any = None
        self.asked: list[Any] = []
        self.address = ""

    async def Quote(self, request: Any, context: Any) -> admission_pb2.QuoteResponse:  # noqa: N802
        return self._say(request)

    async def Explain(self, request: Any, context: Any) -> admission_pb2.ExplainResponse:  # noqa: N802
        return self._say(request)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[admission_pb2.GenerateEvent]:  # noqa: N802
        yield self._say(request)

    def _say(self, request: Any) -> Any:
        self.asked.append(request)
        if isinstance(self.answer, SloServeError):
            raise self.answer
        return self.answer


@pytest.fixture
async def door() -> AsyncIterator[FrontDoor]:
    door, server = FrontDoor(), RpcServer("127.0.0.1:0")
    admission_pb2_grpc.add_AdmissionServicer_to_server(door, server.grpc)
    await server.start([])
    door.address = f"127.0.0.1:{server.port}"
    yield door
    await server.stop(0)


async def slosctl(door: FrontDoor, *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", *arguments, "--admission", door.address),
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "120"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), errors.decode()


async def test_a_quote_that_fits_exits_with_0(door: FrontDoor) -> None:
    verdict = types_pb2.Verdict(
        kind=types_pb2.VERDICT_KIND_ADMITTED,
        replica_id="w1",
        tier="tight",
        predicted_ttft_ms=80,
        ttft_slo_ms=500,
        predicted_tpot_ms=31,
        tpot_slo_ms=50,
    )
    door.answer = admission_pb2.QuoteResponse(fits=True, verdict=verdict, tightest_ttft_ms=61, tightest_tpot_ms=50)
    status, out, errors = await slosctl(
        door, "quote", "Hello", "--stage", "ANSWER:ttft=500,tpot=50", "--max-tokens", "9"
    )
    assert (status, errors) == (0, "")
    assert "FITS on w1, tier tight: TTFT 80 of 500 ms" in out
    assert "61 ms with the TPOT as asked" in out
    (asked,) = door.asked
    assert (asked.request.text, asked.request.stages[0].tpot_ms, asked.request.sampling.max_tokens) == ("Hello", 50, 9)


async def test_a_quote_that_does_not_fit_exits_with_3_and_says_why_and_when(door: FrontDoor) -> None:
    door.answer = admission_pb2.QuoteResponse(verdict=FULL, tightest_ttft_ms=1520)
    status, out, _ = await slosctl(door, "quote", "Hello")
    assert status == 3
    assert "DOES NOT FIT NOW: prefill budget: 900 tokens wanted" in out
    assert "1520 ms with the TPOT as asked" in out
    assert "none with the TTFT as asked" in out
    assert "not known" in out
    assert door.asked[0].request.application == "chatbot"


async def test_an_explanation_shows_why_what_each_replica_said_and_what_was_late(door: FrontDoor) -> None:
    report = admission_pb2.StageReport(
        kind=types_pb2.STAGE_KIND_ANSWER, ttft_slo_ms=500, ttft_ms=812, tpot_slo_ms=50, tpot_ms=21, output_tokens=9
    )
    door.answer = admission_pb2.ExplainResponse(
        verdict=FULL,
        hops=[admission_pb2.HopReport(replica_id="w0", verdict=FULL)],
        stages=[report],
        state="finished",
        why=["no promise: prefill budget: 900 tokens wanted", "stage 0 (ANSWER): first token after 812 ms"],
    )
    status, out, errors = await slosctl(door, "explain", "r-1")
    assert (status, errors) == (0, "")
    assert "r-1: finished, BEST EFFORT" in out
    assert "- no promise: prefill budget: 900 tokens wanted" in out
    row = next(line for line in out.splitlines() if line.strip().startswith("w0"))
    assert row.split() == ["w0", "BEST", "EFFORT", "812", "900", "200", "prefill", "budget"]
    assert "812.0 of 500" in out


async def test_a_request_that_is_being_placed_has_no_verdict_yet(door: FrontDoor) -> None:
    door.answer = admission_pb2.ExplainResponse(state="new", why=["no verdict yet: it has not been placed"])
    status, out, _ = await slosctl(door, "explain", "r-1")
    assert status == 0
    assert [line.strip() for line in out.splitlines()] == ["r-1: new", "- no verdict yet: it has not been placed"]


async def test_an_unknown_request_exits_with_1(door: FrontDoor) -> None:
    door.answer = SloServeError(Reason.REQUEST_UNKNOWN, "no request 'r-1'")
    status, out, errors = await slosctl(door, "explain", "r-1")
    assert (status, out) == (1, "")
    assert "REQUEST_UNKNOWN (NOT_FOUND): no request 'r-1'" in errors


async def test_a_refused_submission_says_what_to_ask(door: FrontDoor) -> None:
    door.answer = SloServeError(Reason.NO_CAPACITY, "full", retry_after_ms=700, metadata={"request_id": "made-up-1"})
    status, out, errors = await slosctl(door, "submit", "Hello")
    assert (status, out) == (3, "")
    assert errors.splitlines() == [
        "NO_CAPACITY (RESOURCE_EXHAUSTED): full",
        "retry after 700 ms",
        "slosctl explain made-up-1",
    ]


async def test_a_stage_that_cannot_be_read_is_named(door: FrontDoor) -> None:
    status, _, errors = await slosctl(door, "quote", "Hello", "--stage", "ANSWER:speed=9")
    assert status == 2
    assert "'speed' is none of" in errors
    assert not door.asked


def test_the_earliest_time_is_told_as_a_distance() -> None:
    verdict = Verdict("BEST_EFFORT", "", "best-effort", 0, 0, 500, 50, None)
    out = io.StringIO()
    Console(file=out, width=100).print(quote_view(Quote(False, verdict, 900, None, 12_340_000), now_us=10_000_000))
    assert "in 2.3 s" in out.getvalue()
