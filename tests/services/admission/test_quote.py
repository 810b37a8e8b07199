"""Quotes: resolved as Generate resolves, and nothing is begun."""

import pytest

from protos import router_pb2, types_pb2
from services.admission.delivery import USUAL_LAG_S
from services.client import InvalidRequestError, Reason, SlosClient, SloServeError, Stage
from services.common.config import Catalogue, Tenant
from tests.services.admission.world import ADMITTED, BEST_EFFORT, World

LIMIT = types_pb2.Constraint(kind=types_pb2.CONSTRAINT_KIND_KV_BLOCKS, needed=90, available=30, detail="KV is short")


async def test_a_quote_carries_the_fleets_best_answer(world: World) -> None:
    verdict = types_pb2.Verdict(kind=BEST_EFFORT, constraint=LIMIT, predicted_ttft_ms=900)
    world.router.quote = router_pb2.RouterQuoteResponse(
        verdict=verdict, tightest_ttft_ms=1200, tightest_tpot_ms=100, earliest_us=7_000_000
    )
    quote = await world.client.quote("Go.", application="chatbot")
    assert (quote.fits, quote.tightest_ttft_ms, quote.tightest_tpot_ms, quote.earliest_us) == (
        False,
        1200 + USUAL_LAG_S * 1000,
        100,
        7_000_000,
    )
    assert quote.verdict.constraint is not None
    assert (quote.verdict.constraint.kind, quote.verdict.constraint.needed) == ("KV_BLOCKS", 90)
    assert quote.verdict.constraint.detail == "KV is short"


async def test_the_routers_are_asked_about_what_generate_would_place(world: World) -> None:
    world.router.quote = router_pb2.RouterQuoteResponse(fits=True, verdict=types_pb2.Verdict(kind=ADMITTED))
    options = {"stages": [Stage(ttft_slowdown=3, tpot_ms=60, max_tokens=9)], "max_tokens": 9}
    assert (await world.client.quote("Return the number.", **options)).fits
    stream = world.client.generate("Return the number.", **options)
    await anext(stream)
    await stream.aclose()
    [quoted], [placed] = world.router.quoted, world.router.placed
    for queued in (quoted, placed):
        assert queued.ttft_deadline_us - queued.arrival_us == round(queued.stages[0].ttft_ms * 1000 - USUAL_LAG_S * 1e6)
        for name in ("request_id", "arrival_us", "ttft_deadline_us", "traceparent", "tier", "promised"):
            queued.ClearField(name)
    assert quoted == placed


async def test_nothing_is_begun_counted_or_placed(world: World) -> None:
    await world.client.quote("Go.", application="chatbot", request_id="mine", resume_grace_s=30)
    assert [queued.request_id == "mine" for queued in world.router.quoted] == [False]
    assert not await world.redis.keys("slos:req:*")
    assert not world.router.place_requests
    assert not world.admission.sessions.live()
    for name in ("slos_serve.offered", "slos_serve.requests", "slos_serve.errors"):
        assert not world.metric(name)


async def test_whatever_generate_refuses_a_quote_refuses_alike(world: World) -> None:
    with pytest.raises(InvalidRequestError) as invalid:
        await world.client.quote("", application="chess")
    assert {violation.field for violation in invalid.value.violations} == {"text", "application"}
    with pytest.raises(SloServeError, match=r"TTFT 1 ms: the fastest replica \(w0\) needs") as impossible:
        await world.client.quote("Go.", stages=[Stage(ttft_ms=1, tpot_ms=100)])
    assert impossible.value.reason is Reason.SLO_IMPOSSIBLE
    assert not world.router.quoted


async def test_a_quote_is_the_tenants_own(world: World, catalogue: Catalogue) -> None:
    keyed = await world.start_admission(
        catalogue.model_copy(update={"tenants": {"free": Tenant(key="free-key-1", min_tpot_ms=80)}})
    )
    async with (
        SlosClient(f"127.0.0.1:{keyed.port}") as nobody,
        SlosClient(f"127.0.0.1:{keyed.port}", "free-key-1") as free,
    ):
        with pytest.raises(SloServeError) as unknown:
            await nobody.quote("Go.", application="chatbot")
        assert unknown.value.reason is Reason.KEY_UNKNOWN
        with pytest.raises(SloServeError) as forbidden:
            await free.quote("Go.", application="coder")
        assert forbidden.value.reason is Reason.SLO_NOT_PERMITTED
        await free.quote("Go.", application="chatbot")
    assert [queued.tenant for queued in world.router.quoted] == ["free"]


async def test_the_routers_own_errors_come_through(world: World) -> None:
    world.router.error = SloServeError(Reason.PLANNER_UNAVAILABLE, "no planner answered", retry_after_ms=500)
    with pytest.raises(SloServeError) as away:
        await world.client.quote("Go.", application="chatbot")
    assert (away.value.reason, away.value.retry_after_ms) == (Reason.PLANNER_UNAVAILABLE, 500)
    lonely = await world.start_admission(routers="127.0.0.1:1")
    async with SlosClient(f"127.0.0.1:{lonely.port}") as client:
        with pytest.raises(SloServeError) as absent:
            await client.quote("Go.", application="chatbot")
    assert absent.value.reason is Reason.ROUTER_UNAVAILABLE


async def test_a_draining_process_quotes_no_more(world: World) -> None:
    await world.admission.drain(0)
    with pytest.raises(SloServeError) as draining:
        await world.client.quote("Go.", application="chatbot")
    assert draining.value.reason is Reason.ADMISSION_DRAINING
