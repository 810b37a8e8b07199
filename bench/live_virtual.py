"""The jobs of a live benchmark in virtual time: what the two schedulers do with them where nothing is ever on its way.

The same jobs at the same times, vLLM's real scheduler with its own policy and with ours, the clock advanced by a
preset's performance model. What a live run reaches less than this is lost between the processes.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.capacity_search import Laboratory, Point
from bench.live_jobs import Scale, live_jobs
from bench.report_files import markdown_table, provenance, write_result
from bench.scenario import ScenarioFile
from bench.scenario_jobs import Workload
from bench.simulator_engine import Engines
from bench.systems import System, parse_systems
from bench.workload import WorkloadError
from services.core.presets import Preset

__all__ = ["run_virtual", "virtual_table"]

_SYSTEMS = "vllm-8192,slos-mh"  # vLLM's budget of tokens on a large GPU


def run_virtual(
    console: Console,
    chosen: Preset,
    file: ScenarioFile,
    workload: Workload,
    rates: tuple[float, ...],
    seconds: float,
    scale: Scale,
    depth: int,
    results: Path,
) -> None:
    """Run every load on both, `depth` batches in flight, and write the result."""
    laboratory = Laboratory(Engines(), chosen, file.tier_list(), chosen.kv_blocks, 1, depth)
    points: list[tuple[System, Point]] = []
    for rate in rates:
        jobs = live_jobs(
            workload,
            file,
            chosen.model,
            replace(scale, context_tokens=chosen.max_model_len),
            rate=rate,
            seconds=seconds,
        )
        if not jobs:
            raise WorkloadError(f"no job arrives within {seconds:g} s at {rate:g}/s")
        points += [
            (system, laboratory.run_jobs(system, workload, jobs, rate, whole=True))
            for system in parse_systems(_SYSTEMS)
        ]
    text = virtual_table(points, f"{workload.scenario} on {chosen.name}, virtual time")
    result: dict[str, Any] = {
        "kind": "virtual",
        "settings": {
            "scenario": workload.scenario, "seconds": seconds, "depth": depth, "tpot_factor": scale.tpot_factor,
            "length_divisor": scale.length_divisor, "stage_tokens": scale.stage_tokens,
        },
        "points": [
            {"system": system.name, "rate": point.rate, "outcome": asdict(point.outcome)} for system, point in points
        ],
        **provenance(chosen),
    }  # fmt: skip
    note = (
        f"{seconds:g} s of arrivals, {depth} batch(es) in flight, outputs cut at {scale.stage_tokens} tokens per stage."
    )
    path = write_result(results, f"virtual-{chosen.name}-{workload.scenario}", result, f"{note}\n\n{text}")
    console.print(text)
    console.print(f"written: {path} and .md")


def virtual_table(points: list[tuple[System, Point]], what: str) -> str:
    """One row per system and load."""
    rows = []
    for system, point in points:
        seen = point.outcome
        rows.append(
            [
                f"{system.name}, {point.rate:.2f}/s", f"{seen.jobs}", f"{seen.attainment:.3f}",
                *((f"{seen.promised}", f"{seen.kept:.3f}") if system.promises else ("", "")),
                f"{seen.ttft_p50_s * 1e3:.0f} / {seen.ttft_p99_s * 1e3:.0f}",
            ]
        )  # fmt: skip
    return markdown_table([what, "jobs", "met", "promised", "kept", "TTFT p50/p99 ms"], rows)
