"""The way from the engine to the client, measured and taken off the deadlines to come."""

import time

import pytest
from opentelemetry.sdk.metrics import MeterProvider

from protos import types_pb2
from services.admission.delivery import DeliveryLag
from services.admission.tokens import ModelTokens
from services.common.clock import Clock
from services.common.instruments import admission_instruments
from tests.services.admission.world import World, ids_of


@pytest.fixture
def lag() -> DeliveryLag:
    return DeliveryLag(Clock(), admission_instruments(MeterProvider().get_meter("test")))


def test_before_a_first_token_was_sent_the_usual_lag_and_spread_are_reckoned_with(lag: DeliveryLag) -> None:
    assert lag.off_s(1.0) == 0.005
    assert lag.spread_s(0.05) == pytest.approx(1.5 * 0.003)


def test_the_lag_of_recent_first_tokens_is_taken_off_but_never_more_than_a_quarter(lag: DeliveryLag) -> None:
    for _ in range(10):
        lag.first_token("w0", 0.030)
    assert lag.off_s(1.0) == pytest.approx(0.030)
    assert lag.off_s(0.1) == pytest.approx(0.025)


def test_the_spread_is_half_as_much_again_as_last_tokens_take_longer_and_at_most_a_quarter_of_a_tpot(
    lag: DeliveryLag,
) -> None:
    for _ in range(16):
        lag.last_token(0.004, 0.010)
    assert lag.spread_s(0.05) == pytest.approx(1.5 * 0.006)
    assert lag.spread_s(0.01) == pytest.approx(0.0025)


def test_the_spread_leaves_out_one_in_a_hundred(lag: DeliveryLag) -> None:
    for spread_ms in range(101):
        lag.last_token(0.0, spread_ms / 1000)
    assert lag.spread_s(1.0) == pytest.approx(1.5 * 0.099)


def test_last_tokens_that_come_sooner_than_first_ones_need_nothing_in_hand(lag: DeliveryLag) -> None:
    for _ in range(16):
        lag.last_token(0.010, 0.004)
    assert lag.spread_s(0.05) == 0.0


async def test_the_engine_is_given_the_clients_deadline_less_the_lag(world: World, tokens: ModelTokens) -> None:
    async def answered() -> types_pb2.QueuedRequest:
        stream = world.client.generate("Go on.", application="chatbot")
        await anext(stream)
        queued = await world.placed()
        batch_ended_us = round(time.time() * 1e6) - 20_000
        world.worker.emit(
            queued.request_id, ids_of(tokens, "ok"), finish=types_pb2.FINISH_REASON_STOP, emitted_us=batch_ended_us
        )
        assert [event async for event in stream]
        return queued

    first, second = await answered(), await answered()
    budgets_us = [queued.ttft_deadline_us - queued.arrival_us for queued in (first, second)]
    assert first.stages == second.stages  # what the client is promised is the same
    assert budgets_us[0] == round(first.stages[0].ttft_ms * 1000) - 5_000
    assert budgets_us[1] <= budgets_us[0] - 15_000


async def test_the_engine_is_told_how_much_longer_last_tokens_take(world: World, tokens: ModelTokens) -> None:
    async def answered() -> types_pb2.QueuedRequest:
        stream = world.client.generate("Go on.", application="chatbot")
        await anext(stream)
        queued = await world.placed()
        now_us = round(time.time() * 1e6)
        world.worker.emit(queued.request_id, ids_of(tokens, "ok"), emitted_us=now_us)
        await anext(stream)  # the first tokens are there: what comes now is a chunk of its own
        world.worker.emit(
            queued.request_id, ids_of(tokens, "ok"), finish=types_pb2.FINISH_REASON_STOP, emitted_us=now_us - 15_000
        )
        assert [event async for event in stream]
        return queued

    first, second = await answered(), await answered()
    assert first.delivery_spread_us == 4_500
    tightest_ms = min(stage.tpot_ms for stage in second.stages)
    assert second.delivery_spread_us == pytest.approx(min(1.5 * 15_000, 250 * tightest_ms), rel=0.3)
