import json
import math
from pathlib import Path

import numpy as np
import pytest

from bench.replay import replay_log
from services.common.clock import Clock
from services.common.config import ConfigError
from services.core.admission import Policy, decide
from services.core.perf_model import PerfModel, Segment
from services.core.view import Decoder, PlanSettings, Prefill, ReplicaView
from services.planner.decision_log import DecisionLog
from services.planner.promises import PlanRun

PLAIN = PlanSettings()
DRAFTING = PlanSettings(acceptance=(0.7 + 1e-16 / 3, 1 / 3), max_verify_tokens=5)


def a_crowded_run(seed: int, policy: Policy = Policy.MH, settings: PlanSettings = PLAIN) -> PlanRun:
    """More candidates than fit, with numbers that have no short decimal form."""
    draw = np.random.default_rng(seed)
    decoders = [
        Decoder(f"d{n}", n % 2, 50 + float(draw.uniform(0.05, 0.2)), 0.05 + 0.05 * (n % 2), 300 + n, 20 + n)
        for n in range(20)
    ]
    view = ReplicaView(
        50.0, PerfModel((Segment(7e-5, 1e-9, 1e-6, 0.0, 0.0248),), 0.0003, 0.987), decoders,
        (Prefill("held", 1, 50.9, 0.1, 800, promised=True),), 500, 700, engine_free_at_s=-math.inf,
    )  # fmt: skip
    candidates = tuple(
        Prefill(f"c{n}", n % 2, 50 + float(draw.uniform(0.2, 1.5)), 0.05 + 0.05 * (n % 2), int(draw.integers(50, 3000)))
        for n in range(12)
    )
    return PlanRun("gpu-0", view, candidates, policy, settings, decide(view, candidates, policy, settings), 0.001)


@pytest.mark.parametrize("settings", [PLAIN, DRAFTING], ids=["plain", "drafting"])
@pytest.mark.parametrize("policy", list(Policy))
def test_replay_under_the_recorded_policy_is_bit_identical(
    tmp_path: Path, policy: Policy, settings: PlanSettings
) -> None:
    path = tmp_path / "decisions.jsonl"
    with DecisionLog(path, 1 << 20, Clock()) as log:
        for seed in range(5):
            log.record(a_crowded_run(seed, policy, settings))
    found = replay_log(path)
    assert (found.plans, found.different, found.unreadable) == (5, 0, 0)
    assert 0 < found.recorded_admitted < found.asked == 60


def test_replay_under_another_policy_counts_what_it_would_have_promised(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    with DecisionLog(path, 1 << 20, Clock()) as log:
        for seed in range(5):
            log.record(a_crowded_run(seed, Policy.GREEDY))
    found = replay_log(path, Policy.MH)
    assert found.replayed_admitted > found.recorded_admitted
    assert found.different > 0
    assert found.same_policy_different == 0


def test_a_record_from_before_a_setting_existed_is_read_with_its_default(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    with DecisionLog(path, 1 << 20, Clock()) as log:
        log.record(a_crowded_run(1))
    record = json.loads(path.read_text())
    del record["settings"]["max_verify_tokens"]
    path.write_text(json.dumps(record) + "\n")
    found = replay_log(path)
    assert (found.plans, found.different, found.unreadable) == (1, 0, 0)


def test_a_changed_decision_shows(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    with DecisionLog(path, 1 << 20, Clock()) as log:
        log.record(a_crowded_run(1))
    record = json.loads(path.read_text())
    record["decisions"]["decisions"][0]["predicted_first_token_s"] = np.nextafter(51.0, 52.0)
    path.write_text(json.dumps(record) + "\nnot json\n")
    found = replay_log(path)
    assert (found.same_policy_different, found.unreadable) == (1, 1)


def test_the_log_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    run = a_crowded_run(1)
    with DecisionLog(path, 100_000, Clock()) as log:
        for _ in range(60):
            log.record(run)
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) <= 100_000
    assert replay_log(path).different == 0


def test_a_log_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="SLOS_DECISION_LOG"):
        DecisionLog(tmp_path / "file" / "log", 1 << 20, Clock())
