"""`python -m bench plan`: how long decisions take, and how good they are.

Times `admission.decide` (building arrays, solving, answers with their constraints) and `form_batch` on one replica of
`opt-6.7b-a100`, over running requests, candidates, tiers and memory. Every measurement is a fresh random replica with
fresh candidates, about a third of which do not fit, so that caches of the last answer or easy instances flatter
nobody. Garbage collection is left on, as it is in the services.

Rows with drafts are of an engine that speculates: acceptance rates are given and every decision chooses the lengths;
batches have them chosen before, as the hook does every few steps.

Wall time is what a caller waits for: the bars are judged by its p99. CPU time of the thread stands beside it; where the
two differ by milliseconds the machine was busy with something else, and the run says little.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import typer

from bench.plan_quality import Quality, measure_quality
from bench.report_files import RESULTS, markdown_table, provenance, write_result
from services.core.admission import Policy, decide
from services.core.batch import form_batch
from services.core.columns import columns_of
from services.core.drafts import with_draft_lengths
from services.core.presets import preset
from services.core.view import Decoder, PlanSettings, Prefill, ReplicaView
from services.core.warm import warm_up

__all__ = ["main"]

_PRESET = "opt-6.7b-a100"
_TPOTS_S = (0.050, 0.100, 0.075)
_RUNNING = (0, 64, 128, 256, 512)
_CANDIDATES = (1, 4, 16, 32, 64)
_MEMORIES = ("loose", "tight")
_BARS_MS = {(256, 32, 2): 1.0, (512, 64, 3): 5.0}
_FORM_BAR_US = 100.0
_ACCEPTANCE = (0.8, 0.5, 0.3)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """Decision times of one cell, milliseconds. `kept` is the mean share of candidates that fit, `drafts` whether the
    engine speculates."""

    what: str
    policy: str
    running: int
    candidates: int
    tiers: int
    memory: str
    drafts: bool
    median_ms: float
    p99_ms: float
    cpu_p99_ms: float
    kept: float


def main(
    out: Annotated[Path, typer.Option(help="folder of the JSON and Markdown results")] = RESULTS,
    policy: Annotated[list[Policy] | None, typer.Option(help="policies to time (default: mh and greedy)")] = None,
    repeats: Annotated[int, typer.Option(help="random replicas per cell")] = 200,
    small: Annotated[int, typer.Option(help="small replicas to compare with brute force; 0: none")] = 1000,
    seed: Annotated[int, typer.Option(help="seed of the random replicas")] = 1,
) -> None:
    """Time decisions over running requests, candidates, tiers and memory."""
    policies = policy or [Policy.MH, Policy.GREEDY]
    for one in policies:
        warm_up(one)
    rows: list[Row] = []
    for one in policies:
        for cell in _cells():
            rows.append(_time_decisions(one, cell, repeats, seed))
            typer.echo(_line(rows[-1]))
    for running, drafts in [*((running, False) for running in _RUNNING[1:]), (256, True)]:
        rows.append(_time_batches(running, drafts, repeats, seed))
        typer.echo(_line(rows[-1]))
    qualities = [measure_quality(small, seed, weighted=weighted) for weighted in (False, True)] if small else []
    for quality in qualities:
        typer.echo(_quality_line(quality))
    _store(out, rows, qualities, repeats, seed)


@dataclass(frozen=True, slots=True)
class Cell:
    """What is decided on. Memory is `loose` or `tight`."""

    running: int
    candidates: int
    tiers: int
    memory: str
    drafts: bool = False

    @property
    def settings(self) -> PlanSettings:
        """What the core plans it with."""
        return PlanSettings(acceptance=_ACCEPTANCE[: self.tiers] if self.drafts else ())


def _cells() -> Iterator[Cell]:
    """Running x candidates at two tiers, both memories; tiers at the two cells that have a bar; those with drafts."""
    for running, candidates, memory in itertools.product(_RUNNING, _CANDIDATES, _MEMORIES):
        yield Cell(running, candidates, 2, memory)
    for (running, candidates), tiers in itertools.product(((256, 32), (512, 64)), (1, 3)):
        for memory in _MEMORIES:
            yield Cell(running, candidates, tiers, memory)
    for (running, candidates, tiers), memory in itertools.product(_BARS_MS, _MEMORIES):
        yield Cell(running, candidates, tiers, memory, drafts=True)


def _time_decisions(policy: Policy, cell: Cell, repeats: int, seed: int) -> Row:
    rng = random.Random(f"{seed} {cell.running} {cell.candidates} {cell.tiers} {cell.memory}")
    took: list[tuple[float, float]] = []
    kept: list[float] = []
    for _ in range(repeats):
        view = _replica(rng, cell.running, cell.tiers, cell.memory)
        asked = [_candidate(rng, index, cell.tiers, cell.candidates, cell.running) for index in range(cell.candidates)]
        spent, decisions = _timed(partial(decide, view, asked, policy, cell.settings))
        took.append(spent)
        kept.append(len(decisions.admitted_ids) / cell.candidates)
    return _row("decide", policy, cell, took, float(np.mean(kept)))


def _time_batches(running: int, drafts: bool, repeats: int, seed: int) -> Row:
    """Batch formation as the hook calls it: decoders in columns, four promised prefills that fit, lengths chosen."""
    cell = Cell(running, 4, 2, "loose", drafts)
    rng = random.Random(f"{seed} {running}")
    took: list[tuple[float, float]] = []
    for _ in range(repeats):
        view = _replica(rng, running, 2, "loose")
        asked = [_candidate(rng, index, 2, 4, running) for index in range(4)]
        fitting = decide(view, asked, settings=cell.settings).by_id
        held = [replace(p, promised=True) for p in asked if fitting[p.id].admitted]
        columns = columns_of(view.decoders)
        settings = with_draft_lengths(cell.settings, view.model, columns, held)
        view = replace(view, decoders=replace(columns), prefills=held)  # nothing of it summed up yet
        took.append(_timed(partial(form_batch, view, settings))[0])
    return _row("form_batch", None, cell, took, 1.0)


def _timed(call: Callable[[], T]) -> tuple[tuple[float, float], T]:
    """Wall and CPU seconds of a call, and its result."""
    started_s, started_cpu_s = time.perf_counter(), time.thread_time()
    result = call()
    return (time.perf_counter() - started_s, time.thread_time() - started_cpu_s), result


def _tpot_s(tier: int, running: int) -> float:
    """More than some 300 requests cannot decode within 50 ms on this model, so large replicas have looser tiers."""
    return _TPOTS_S[tier] * (1.0 if running <= 256 else 2.0)


def _replica(rng: random.Random, running: int, tiers: int, memory: str) -> ReplicaView:
    """A replica in mid-service. Loose memory holds everything; tight memory is nearly used up."""
    chosen = preset(_PRESET)
    decoders = []
    for index in range(running):
        tier = rng.randrange(tiers)
        tpot_s = _tpot_s(tier, running)
        due_s = tpot_s * rng.uniform(1.0, 2.0)
        decoders.append(Decoder(f"d{index}", tier, due_s, tpot_s, rng.randint(50, 900), rng.randint(2, 400)))
    used = sum(-(-d.context_tokens // chosen.block_size) for d in decoders)
    growth = sum(d.remaining_tokens for d in decoders) // chosen.block_size
    free = max(100, growth // 2) + 500 if memory == "tight" else 1_000_000
    return ReplicaView(0.0, chosen.model, decoders, (), free, used + free, max_num_seqs=1024)


def _candidate(rng: random.Random, index: int, tiers: int, of: int, running: int) -> Prefill:
    tier = rng.randrange(tiers)
    prompt = min(6000, int(rng.lognormvariate(6.2, 0.9)) + 8)
    window_s = rng.uniform(0.1, 0.1 + 0.06 * of)
    return Prefill(
        f"c{index}", tier, window_s, _tpot_s(tier, running), prompt, 0, rng.randint(10, 400), weight=1, arrival_s=0.0
    )


def _row(what: str, policy: Policy | None, cell: Cell, took_s: Sequence[tuple[float, float]], kept: float) -> Row:
    wall_ms, cpu_ms = np.array(took_s).T * 1e3
    return Row(
        what,
        policy.value if policy else "-",
        cell.running,
        cell.candidates,
        cell.tiers,
        cell.memory,
        cell.drafts,
        float(np.median(wall_ms)),
        float(np.quantile(wall_ms, 0.99)),
        float(np.quantile(cpu_ms, 0.99)),
        kept,
    )


def _line(row: Row) -> str:
    return (
        f"{row.what:<10} {row.policy:<6} {row.running:>4} running {row.candidates:>3} candidates {row.tiers} tiers "
        f"{row.memory:<5}{' drafts' if row.drafts else '':<7} median {row.median_ms:7.3f} ms  "
        f"p99 {row.p99_ms:7.3f} ms  CPU p99 {row.cpu_p99_ms:6.3f} ms  kept {row.kept:4.0%}{_bar(row)}"
    )


def _bar(row: Row) -> str:
    """What the bar of this cell says, if it has one."""
    if row.what == "form_batch" and row.running == 256:
        return f"  bar: median {_FORM_BAR_US:.0f} us, {'met' if row.median_ms * 1e3 < _FORM_BAR_US else 'MISSED'}"
    bar_ms = _BARS_MS.get((row.running, row.candidates, row.tiers))
    if bar_ms is None or row.what != "decide":
        return ""
    return f"  bar: p99 {bar_ms:g} ms, {'met' if row.p99_ms < bar_ms else 'MISSED'}"


def _quality_line(quality: Quality) -> str:
    kept = ", ".join(f"{name} {share:.1%}" for name, share in quality.kept.items() if name != "best")
    return (
        f"weights {quality.weights}: of the best possible kept by {kept}; {quality.conflicts} of {quality.instances} "
        f"replicas in conflict, greedy beats plain mh on {quality.greedy_beats_plain_mh}"
    )


def _store(out: Path, rows: Sequence[Row], qualities: Sequence[Quality], repeats: int, seed: int) -> None:
    result = {
        **provenance(preset(_PRESET)),
        "settings": {"repeats": repeats, "seed": seed},
        "rows": [asdict(row) for row in rows],
        "quality": [asdict(quality) for quality in qualities],
    }
    header = ("what", "policy", "running", "candidates", "tiers", "memory", "drafts")
    table = [
        [r.what, r.policy, str(r.running), str(r.candidates), str(r.tiers), r.memory, "yes" if r.drafts else ""]
        + [f"{ms:.3f}" for ms in (r.median_ms, r.p99_ms, r.cpu_p99_ms)]
        + [f"{r.kept:.0%}", _bar(r).removeprefix("  bar: ")]
        for r in rows
    ]
    path = write_result(
        out,
        "plan",
        result,
        f"# Decision times\n\n`python -m bench plan`, {_PRESET}, {repeats} random replicas per row, seed {seed}. "
        f"Bars are judged by p99 of wall time. With drafts: acceptance {', '.join(map(str, _ACCEPTANCE))} by tier, "
        "lengths chosen in the decision.\n\n"
        + markdown_table((*header, "median ms", "p99 ms", "CPU p99 ms", "kept", "bar"), table)
        + "\n## Of the best possible\n\n"
        + "".join(f"- {_quality_line(quality)}\n" for quality in qualities),
    )
    typer.echo(f"stored {path} and {path.with_suffix('.md')}")
