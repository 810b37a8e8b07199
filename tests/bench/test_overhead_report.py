"""The overhead report, from timings to its tables."""

from dataclasses import replace

import pytest

from bench.overhead import Timing, added, quantiles, tables


def test_what_is_added_is_the_difference_of_quantiles_and_the_tables_show_the_bars() -> None:
    bare = [Timing(0.050 + index / 1000, 0.025, 64, 1.0) for index in range(11)]
    services = [replace(timing, ttft_s=timing.ttft_s + 0.004, tpot_s=0.0253) for timing in bare]
    found = added({"bare": bare, "services": services})
    assert found["ttft_p50_ms"] == pytest.approx(4.0)
    assert found["tpot_p50_ms"] == pytest.approx(0.3)
    assert found["ttft_paired_p99_ms"] == pytest.approx(4.0)
    text = tables(
        {
            "systems": {"bare": quantiles(bare), "services": quantiles(services)},
            "added_ms": found,
            "memory_idle_mib": {"planner-0": 220.0, "router-0": 70.0, "admission-0": 90.0},
            "streaming": {"streams": 8.0, "tokens": 80.0, "tokens_per_s": 1000.0, "tokens_per_admission_cpu_s": 9000.0},
            "cpu_ms_per_request": {"admission-0": 30.0},
            "machine": {"bare": [{"others": 0.1}], "services": [{"others": 0.3}]},
        }
    )
    assert "| ttft_p50 | 55.00 | 59.00 | +4.00 | < 5 |" in text
    assert "| 380 | 500 |" in text
    assert "| 0.10 / 0.30 |" in text
