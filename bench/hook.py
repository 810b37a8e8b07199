"""`python -m bench hook`: what the hook adds to a step of vLLM's scheduler.

Our scheduler and vLLM's own run side by side in one process, step by step in turns, with the same requests; an *extra*
is the difference between two neighbouring steps. Timed is everything an engine's step waits for: `schedule()` and
`update_from_output()`, reports to the worker included. `decode` is a steady batch of promised decoders, `serving` the
same with turnover: whoever finishes is replaced by a promised, a pending or a best-effort request.

Wall time is what the engine waits for on this machine, CPU time of the thread what the step costs where others run too.
With two batches in flight the step of an engine runs beside the device; with one it stands in its way.
"""

import gc
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bench.hook_pair import Arrival, Side, Spent, sides
from bench.report_files import RESULTS, markdown_table, provenance, write_result
from bench.simulator_engine import Engines, EngineShape
from services.core.presets import preset

__all__ = ["main"]

_PRESET = "opt-6.7b-a100"
_RUNNING = (0, 1, 64, 128, 256, 512)
_BAR_US = 300.0
_WARM_UP_STEPS = 30
_FOREVER = 100_000


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds per step with `running` requests and `depth` batches in flight."""

    load: str
    running: int
    depth: int
    vllm_us: float
    ours_us: float
    extra_us: float
    extra_p95_us: float
    vllm_cpu_us: float
    extra_cpu_us: float
    mean_running: float


def main(
    out: Annotated[Path, typer.Option(help="folder of the JSON and Markdown results")] = RESULTS,
    steps: Annotated[int, typer.Option(help="timed pairs of steps per row")] = 400,
    running: Annotated[list[int] | None, typer.Option(help="running requests (default: 0 to 512)")] = None,
    seed: Annotated[int, typer.Option(help="seed of the requests")] = 1,
) -> None:
    """Time steps with and without the hook, in turns."""
    engines = Engines()
    rows: list[Row] = []
    for depth in (1, 2):
        for load in ("decode", "serving"):
            for count in running or _RUNNING:
                if count or load == "decode":
                    rows.append(_measure(engines, load, count, depth, steps, seed))
                    typer.echo(_line(rows[-1]))
    _store(out, rows, steps, seed)


def _measure(engines: Engines, load: str, count: int, depth: int, steps: int, seed: int) -> Row:
    chosen = preset(_PRESET)
    shape = EngineShape(replace(chosen, max_num_seqs=1024), depth=depth, kv_blocks=60_000)
    rng = random.Random(f"{seed} {load} {count} {depth}")
    with sides(engines, shape) as (ours, plain):
        for _ in range(count):
            _send(_first(rng, load, count), ours, plain)
        while ours.scheduler.waiting or plain.scheduler.waiting:
            ours.step()
            plain.step()
        gc.collect()
        gc.freeze()  # as vLLM's engine does once it has started
        took: list[tuple[Spent, Spent]] = []
        seen = 0
        for index in range(_WARM_UP_STEPS + steps):
            while load == "serving" and min(ours.unfinished, plain.unfinished) < count + count // 4:
                _send(_next(rng, count), ours, plain)
            pair = [ours, plain] if index % 2 else [plain, ours]  # neither is always the one with the warm caches
            spent = {id(side): side.step() for side in pair}
            if index >= _WARM_UP_STEPS:
                took.append((spent[id(ours)], spent[id(plain)]))
                seen += len(ours.scheduler.running)
    ours_us, vllm_us = np.array(took).transpose(1, 2, 0) * 1e6  # each: by the clock, of the CPU
    extra_us, extra_cpu_us = ours_us - vllm_us
    columns = (vllm_us[0], ours_us[0], extra_us, vllm_us[1], extra_cpu_us)
    vllm, mine, extra, vllm_cpu, extra_cpu = (float(np.median(column)) for column in columns)
    return Row(
        load, count, depth, vllm, mine, extra, float(np.quantile(extra_us, 0.95)), vllm_cpu, extra_cpu, seen / steps
    )


def _send(arrival: Arrival, *to: Side) -> None:
    for side in to:
        side.send(arrival)


def _tier(rng: random.Random, count: int) -> tuple[str, float]:
    """More than some 300 requests cannot decode within 50 ms on this model, so large batches have looser tiers."""
    name, tpot_s = rng.choice([("tight", 0.05), ("loose", 0.1)])
    return name, tpot_s * (1.0 if count <= 256 else 2.0)


def _first(rng: random.Random, load: str, count: int) -> Arrival:
    tier, tpot_s = _tier(rng, count)
    output = _FOREVER if load == "decode" else rng.randint(20, 400)
    return Arrival(rng.randint(20, 200), output, tier, tpot_s, 60.0, True, False)


def _next(rng: random.Random, count: int) -> Arrival:
    tier, tpot_s = _tier(rng, count)
    kind = rng.choices(["promised", "pending", "best effort"], [0.6, 0.25, 0.15])[0]
    prompt, output = rng.randint(20, 600), rng.randint(20, 400)
    return Arrival(prompt, output, tier, tpot_s, 2.0, kind == "promised", kind == "pending")


def _line(row: Row) -> str:
    return (
        f"{row.load:<8} {row.running:>4} running ({row.mean_running:5.0f} seen)  depth {row.depth}  "
        f"vLLM {row.vllm_us:7.0f} us  ours {row.ours_us:7.0f} us  "
        f"extra {row.extra_us:6.0f} us (p95 {row.extra_p95_us:.0f})  "
        f"CPU {row.vllm_cpu_us:.0f} + {row.extra_cpu_us:.0f} us{_bar(row)}"
    )


def _bar(row: Row) -> str:
    if row.running != 256:
        return ""
    return f"  bar: {_BAR_US:.0f} us, {'met' if row.extra_us < _BAR_US else 'MISSED'}"


def _store(out: Path, rows: Sequence[Row], steps: int, seed: int) -> None:
    result = {
        **provenance(preset(_PRESET)),
        "settings": {"steps": steps, "seed": seed},
        "rows": [asdict(row) for row in rows],
    }
    table = [
        [r.load, str(r.running), str(r.depth)]
        + [f"{us:.0f}" for us in (r.vllm_us, r.ours_us, r.extra_us, r.extra_p95_us, r.vllm_cpu_us, r.extra_cpu_us)]
        + [_bar(r).removeprefix("  bar: ")]
        for r in rows
    ]
    header = (
        "load",
        "running",
        "in flight",
        "vLLM us",
        "ours us",
        "extra us",
        "extra p95 us",
        "vLLM CPU us",
        "extra CPU us",
        "bar",
    )
    path = write_result(
        out,
        "hook",
        result,
        f"# Time per step\n\n`python -m bench hook`, {_PRESET}, {steps} pairs of steps per row, seed {seed}: "
        "`schedule()` and `update_from_output()` of vLLM's scheduler and of ours, in turns. Extra is the median of the "
        "differences.\n\n" + markdown_table(header, table),
    )
    typer.echo(f"stored {path} and {path.with_suffix('.md')}")
