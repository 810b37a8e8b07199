"""Quote, Explain and rejections as Python callers see them."""

import pytest

from protos import admission_pb2, types_pb2
from services.client import (
    Constraint,
    Explanation,
    HopReport,
    Quote,
    Reason,
    SlosClient,
    SloServeError,
    Stage,
    StageReport,
    Verdict,
    rejected_verdict,
)
from tests.services.client.conftest import ScriptedAdmission

LIMIT = types_pb2.Constraint(kind=types_pb2.CONSTRAINT_KIND_PREFILL_BUDGET, needed=900, available=200, detail="full")
REFUSED = types_pb2.Verdict(
    kind=types_pb2.VERDICT_KIND_BEST_EFFORT, tier="best-effort", constraint=LIMIT, retry_after_ms=700
)
SEEN = Verdict("BEST_EFFORT", "", "best-effort", 0, 0, 0, 0, Constraint("PREFILL_BUDGET", 900, 200, "full"), 700)


async def test_a_quote_takes_what_generate_takes(admission: ScriptedAdmission, client: SlosClient) -> None:
    admission.answers = [
        admission_pb2.QuoteResponse(verdict=REFUSED, tightest_ttft_ms=1500, tightest_tpot_ms=0, earliest_us=9_000_000)
    ]
    quote = await client.quote([1, 2, 3], stages=[Stage(ttft_ms=800, tpot_ms=60)], max_tokens=7)
    assert quote == Quote(False, SEEN, 1500, None, 9_000_000)
    (asked,) = admission.asked
    assert (list(asked.request.token_ids.ids), asked.request.stages[0].ttft_ms) == ([1, 2, 3], 800)
    assert asked.request.sampling.max_tokens == 7
    assert admission.metadata[0]["authorization"] == "Bearer some-key"


async def test_an_explanation_is_typed(admission: ScriptedAdmission, client: SlosClient) -> None:
    report = admission_pb2.StageReport(
        kind=types_pb2.STAGE_KIND_ANSWER, ttft_slo_ms=500, ttft_ms=812, tpot_slo_ms=100, tpot_ms=9, output_tokens=2
    )
    admission.answers = [
        admission_pb2.ExplainResponse(
            verdict=REFUSED,
            hops=[admission_pb2.HopReport(replica_id="w0", verdict=REFUSED)],
            stages=[report],
            state="finished",
            why=["no promise: full"],
        )
    ]
    assert await client.explain("r-1") == Explanation(
        "finished",
        SEEN,
        (HopReport("w0", SEEN),),
        (StageReport("ANSWER", 500, 812, 100, 9, 2, False),),
        ("no promise: full",),
    )
    assert admission.asked[0].request_id == "r-1"


@pytest.mark.parametrize("call", ["quote", "explain"])
async def test_their_errors_are_typed(admission: ScriptedAdmission, client: SlosClient, call: str) -> None:
    admission.answers = [SloServeError(Reason.REQUEST_UNKNOWN, "no request 'x'")]
    with pytest.raises(SloServeError) as unknown:
        await getattr(client, call)("x")
    assert unknown.value.reason is Reason.REQUEST_UNKNOWN


async def test_a_rejection_gives_its_verdict_and_the_requests_id(
    admission: ScriptedAdmission, client: SlosClient
) -> None:
    async def full(request: object, context: object) -> object:
        raise SloServeError(
            Reason.NO_CAPACITY, "full", retry_after_ms=700, details=(REFUSED,), metadata={"request_id": "made-up-1"}
        )
        yield

    admission.scripts = [full]
    with pytest.raises(SloServeError) as shed:
        await anext(client.generate("x", application="chatbot", on_infeasible="REJECT"))
    assert rejected_verdict(shed.value) == SEEN
    assert (shed.value.retry_after_ms, shed.value.metadata) == (700, {"request_id": "made-up-1"})
    assert rejected_verdict(SloServeError(Reason.INTERNAL, "nothing inside")) is None
