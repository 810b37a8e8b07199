"""Speculation in the hook: lengths per tier, drafts cut without touching anybody else's, acceptance learnt on line."""

from collections.abc import Mapping
from itertools import pairwise

import msgspec
import numpy as np
import pytest

from services.core.columns import DecoderColumns
from services.core.perf_model import PerfModel, Segment
from services.core.speculation import expected_tokens
from services.core.view import PlanSettings, Prefill
from services.worker.hook_mirror import HookMirror
from services.worker.hook_speculation import Speculation
from services.worker.link import ReportMessage
from tests.services.worker.driven_scheduler import DrivenScheduler, driven

DEPTHS = pytest.mark.parametrize("depth", [1, 2])
MODEL = PerfModel((Segment(7e-5, b=0.025),))


def columns(tiers: list[int], tpots_s: list[float]) -> DecoderColumns:
    n = len(tiers)
    return DecoderColumns(
        [f"d{i}" for i in range(n)],
        np.array(tiers),
        np.full(n, 1.0),
        np.array(tpots_s),
        np.full(n, 100),
        np.full(n, 50),
        np.ones(n, np.bool_),
    )


def prefill(tier: int) -> Prefill:
    return Prefill("p", tier, 5.0, 0.05 if tier == 0 else 0.1, 4000, application="app", promised=True)


def chosen(speculation: Speculation, decoders: DecoderColumns, prefills: list[Prefill]) -> tuple[int, ...]:
    applications = np.zeros(len(decoders), np.int64)
    settings = PlanSettings()
    for _ in range(9):  # the first choice and every 64th are probes
        found = speculation.settings(settings, MODEL, decoders, applications, prefills)
    return found.verify_tokens


def learnt(rate: float) -> Speculation:
    speculation = Speculation(10)
    speculation.application("app")
    speculation.observe({"app": (20_000, round(20_000 * rate))})
    return speculation


def test_the_tight_tier_speculates_and_the_loose_one_need_not() -> None:
    tight, loose = chosen(learnt(0.8), columns([0] * 20 + [1] * 20, [0.05] * 20 + [0.1] * 20), [prefill(1)])
    assert 1 <= loose < tight <= 10


def test_nobody_speculates_where_nothing_is_accepted() -> None:
    assert chosen(learnt(0.0), columns([0] * 20 + [1] * 20, [0.05] * 20 + [0.1] * 20), [prefill(1)]) == (1, 1)


def test_without_prefills_it_speculates_for_speed() -> None:
    lengths = chosen(learnt(0.8), columns([0] * 4, [0.5] * 4), [])
    assert lengths[0] > 3
    many = chosen(learnt(0.8), columns([0] * 2000, [0.5] * 2000), [])
    assert many[0] < lengths[0]


def test_a_tier_without_drafts_tries_one_now_and_then() -> None:
    speculation = learnt(0.0)
    decoders = columns([0] * 20, [0.05] * 20)
    settings, applications = PlanSettings(), np.zeros(20, np.int64)
    lengths = [
        speculation.settings(settings, MODEL, decoders, applications, [prefill(0)]).verify_tokens[0] for _ in range(200)
    ]
    assert {1, 2} == set(lengths)
    assert lengths.count(2) <= 40


def test_acceptance_is_published_when_it_changed_by_more_than_a_little() -> None:
    speculation = Speculation(10)
    assert speculation.take_acceptance() is None
    speculation.observe({"app": (20_000, 10_000)})
    assert speculation.take_acceptance() == pytest.approx({"app": 0.5})
    speculation.observe({"app": (20_000, 10_300)})
    assert speculation.take_acceptance() is None
    speculation.observe({"app": (20_000, 10_450)})  # little by little, but more than a little since it was published
    assert speculation.take_acceptance() == pytest.approx({"app": 0.5225})
    speculation.observe({"other": (1, 0)})
    assert set(speculation.take_acceptance()) == {"app", "other"}


def test_speed_without_prefills_costs_no_tier_its_pace() -> None:
    speculation = Speculation(10)
    assert (speculation.application("fast"), speculation.application("slow")) == (0, 1)
    speculation.observe({"fast": (20_000, 19_000), "slow": (20_000, 0)})
    decoders = columns([0] * 30 + [1] * 300, [0.05] * 30 + [0.5] * 300)
    applications = np.array([1] * 30 + [0] * 300)
    for _ in range(9):
        found = speculation.settings(PlanSettings(), MODEL, decoders, applications, [])
    tokens = int(np.array(found.verify_tokens)[decoders.tier].sum())
    assert found.verify_tokens[1] == 1  # with one draft more, 660 tokens take 71 ms, and the tight tier gains none
    assert MODEL.tokens_within(0.05) >= tokens


def test_an_engine_without_drafts_plans_as_before() -> None:
    settings = PlanSettings()
    found = Speculation(1).settings(settings, MODEL, columns([0], [0.05]), np.zeros(1, np.int64), [])
    assert found is settings


def tokens_per_step(replica: DrivenScheduler) -> float:
    """Of the decoding steps of a run without preemption."""
    decoding = [output for output in replica.batches if output.total_num_scheduled_tokens]
    return sum(len(sent.tokens) for sent in replica.sent.values()) / len(decoding)


@DEPTHS
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9])
def test_acceptance_is_learnt_on_line(depth: int, acceptance: float) -> None:
    with driven(depth=depth, speculation_tokens=9, acceptance=acceptance) as replica:
        for index in range(8):
            replica.send(f"r{index}", 40, 400, ttft_s=5.0)
        replica.run()
        assert replica.scheduler._hook.speculation.estimator.rate("app") == pytest.approx(acceptance, abs=0.08)


def test_the_worker_is_told_what_was_learnt() -> None:
    with driven(depth=1, speculation_tokens=9, acceptance=0.8) as replica:
        for index in range(4):
            replica.send(f"r{index}", 40, 300, ttft_s=5.0)
        replica.run()
        mirror, told = HookMirror(), list[Mapping[str, float]]()
        while replica.worker_end.poll(100):
            report = mirror.apply(msgspec.msgpack.decode(replica.worker_end.recv(), type=ReportMessage))
            if report.acceptance is not None:
                told.append(report.acceptance)
        assert mirror.snapshot().acceptance is None
        assert told[-1]["app"] == pytest.approx(replica.scheduler._hook.speculation.estimator.rate("app"), abs=0.02)
        assert all(abs(then["app"] - now["app"]) >= 0.02 for then, now in pairwise(told))


def test_drafts_are_cut_to_the_tiers_length_and_the_shared_list_stays_whole() -> None:
    with driven(depth=2, speculation_tokens=9, acceptance=0.8) as replica:
        for index in range(12):
            replica.send(f"t{index}", 40, 300, ttft_s=5.0, tpot_s=0.05, tier="tight")
            replica.send(f"l{index}", 40, 300, ttft_s=5.0, tpot_s=0.15, tier="loose")
        replica.send("long", 25_000, 5, ttft_s=6.0, tpot_s=0.15, tier="loose")
        seen: set[tuple[int, int]] = set()
        while not replica.sent["long"].tokens:
            drafts = replica.step().scheduled_spec_decode_tokens
            tight = [len(ids) for key, ids in drafts.items() if key.startswith("t")]
            loose = [len(ids) for key, ids in drafts.items() if key.startswith("l")]
            seen.add((max(tight, default=0), max(loose, default=0)))
            assert len(set(tight)) <= 1 or depth_changes(tight)
            assert len(replica.scheduler._spec_token_placeholders) == 9
        assert any(tight > loose for tight, loose in seen), seen
        replica.run()
        assert all(sent.missed == "" for sent in replica.sent.values())


def depth_changes(lengths: list[int]) -> bool:
    """Two lengths at most: of before and after a new choice, or at a request's end."""
    return len(set(lengths)) <= 3


@DEPTHS
def test_speculation_keeps_promises_that_plain_decoding_cannot(depth: int) -> None:
    def missed(drafts: int) -> int:
        with driven(depth=depth, speculation_tokens=drafts, acceptance=0.85) as replica:
            tight = [replica.send(f"t{i}", 40, 250, ttft_s=0.5, tpot_s=0.018, tier="tight") for i in range(16)]
            while not all(sent.tokens for sent in tight):
                replica.step()
            for index in range(6):
                replica.send(f"p{index}", 2500, 5, ttft_s=1.6, tpot_s=0.1, tier="loose")
            replica.run()
            return sum(sent.missed != "" for sent in replica.sent.values())

    assert missed(9) < missed(0)


def test_a_step_is_expected_to_yield_what_is_accepted() -> None:
    assert learnt(0.5).tokens_per_step == pytest.approx(expected_tokens(10, 0.5), rel=0.02)
