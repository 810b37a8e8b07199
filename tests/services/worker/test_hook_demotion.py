"""Promises that cannot be kept any more give way, visibly; floors under applications; outlived forecasts."""

import msgspec
import pytest

from services.core.constraint import ConstraintKind
from services.core.floors import FLOOR_WEIGHT
from services.core.slo import VerdictMode
from services.worker.hook_mirror import HookMirror
from services.worker.link import Reforecast, ReportMessage
from tests.services.worker.driven_scheduler import DrivenScheduler, driven

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


def reported_demotions(replica: DrivenScheduler, count: int) -> dict[str, ConstraintKind]:
    """What the worker is told about lost promises, through its mirror of the engine."""
    assert replica.worker_end is not None
    mirror = HookMirror()
    found: dict[str, ConstraintKind] = {}
    while len(found) < count:
        assert replica.worker_end.poll(5000), f"only {sorted(found)} were demoted"
        report = mirror.apply(msgspec.msgpack.decode(replica.worker_end.recv(), type=ReportMessage))
        found.update((one.request_id, one.constraint.kind) for one in report.demoted)
    return found


@DEPTHS
def test_a_prefill_that_would_be_late_even_alone_gives_way_to_one_that_can_be_in_time(depth: int) -> None:
    with driven(depth=depth) as replica:
        lost = replica.send("lost", 6000, 5, ttft_s=0.25)
        fine = replica.send("fine", 3000, 5, ttft_s=0.4)
        replica.run()
        assert reported_demotions(replica, 1) == {"lost": ConstraintKind.HOPELESS}
        assert fine.missed == ""
        assert len(lost.tokens) == 5
        assert lost.times_s[0] > fine.times_s[0]


@DEPTHS
def test_a_decoder_that_cannot_catch_up_any_more_is_demoted_and_the_others_are_not(depth: int) -> None:
    with driven(depth=depth) as replica:
        short = replica.send("short", 32, 12, tpot_s=0.05)
        long = replica.send("long", 32, 200, tpot_s=0.05)
        while len(short.tokens) < 8:
            replica.step()
        replica.now_s += 0.8  # the device stood still: 4 tokens cannot make up for it, 190 can
        replica.run()
        assert reported_demotions(replica, 1) == {"short": ConstraintKind.TPOT}
        assert long.missed == ""
        assert len(short.tokens) == 12


def test_a_promise_that_merely_runs_late_stands() -> None:
    with driven() as replica:
        decoder = replica.send("p", 32, 200, tpot_s=0.05)
        while len(decoder.tokens) < 50:
            replica.step()
        replica.now_s += 0.3
        replica.step()
        assert replica.scheduler._tracked["p"].promised
        replica.run()
        assert decoder.missed == ""


def test_an_application_below_its_floor_counts_ten_times_until_it_recovers() -> None:
    with driven() as replica:
        outcomes = replica.scheduler._hook.outcomes
        for index in range(12):
            replica.send(f"lost{index}", 6000, 2, ttft_s=0.1, pending=VerdictMode.EARLY, application="coder")
        replica.run()
        assert outcomes.attainment("coder") < 0.85
        replica.send("next", 500, 2, ttft_s=2.0, pending=VerdictMode.EARLY, application="coder", weight=3)
        replica.send("other", 500, 2, ttft_s=2.0, pending=VerdictMode.EARLY, application="chatbot", weight=3)
        tracked = replica.scheduler._tracked
        assert outcomes.weight(tracked["next"]) == 3 * FLOOR_WEIGHT
        assert outcomes.weight(tracked["other"]) == 3
        for index in range(100):
            replica.send(f"fine{index}", 20, 2, ttft_s=10.0, application="coder")
        replica.run()
        assert outcomes.attainment("coder") > 0.85


def test_a_floor_saves_the_long_prompts_of_an_application_that_lost_before() -> None:
    def kept(attainment_floor: float) -> bool:
        with driven(attainment_floor=attainment_floor) as replica:
            for index in range(12):
                replica.send(f"lost{index}", 6000, 2, ttft_s=0.1, pending=VerdictMode.LATE, application="coder")
            replica.run()
            for index in range(6):
                replica.send(f"chat{index}", 1500, 2, ttft_s=0.7, pending=VerdictMode.LATE, application="chatbot")
            coder = replica.send("coder", 6000, 2, ttft_s=0.7, pending=VerdictMode.LATE, application="coder")
            replica.run()
            return coder.missed == ""

    assert kept(0.85)
    assert not kept(0.0)


@DEPTHS
def test_a_new_forecast_reaches_the_plan(depth: int) -> None:
    with driven(depth=depth) as replica:
        sent = replica.send("p", 32, 300, forecast=10)
        while len(sent.tokens) < 20:
            replica.step()
        hook = replica.scheduler._hook
        outputs = int(hook.table.ints("outputs")[0])
        assert hook.table.forecast_left.tolist() == [outputs]  # outlived: as many again, until somebody knows better
        replica.scheduler._obey(Reforecast("p", 120), replica.now_s)
        assert hook.table.forecast_left.tolist() == [120 - outputs]
        replica.run()
        assert len(sent.tokens) == 300
