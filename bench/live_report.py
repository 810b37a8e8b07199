"""A live benchmark's table, plot and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.live_round import Round
from bench.metrics import Outcome
from bench.report_files import markdown_table

__all__ = ["Measured", "attainment_plot", "point_json", "table"]

_TARGET = 0.9


@dataclass(frozen=True, slots=True)
class Measured:
    """One round, judged. `kept_by_service`: promises that the services say they kept, and how many there were."""

    system: str
    rate: float
    repetition: int
    outcome: Outcome
    round: Round
    kept_by_service: tuple[int, int] | None

    @property
    def tokens_per_s(self) -> float:
        """Output tokens that reached clients, per second of the round."""
        return self.round.output_tokens / self.round.seconds


def point_json(measured: Measured) -> dict[str, Any]:
    """One point with everything that was counted."""
    late_ms = np.array(measured.round.late_s or [0.0]) * 1e3
    return {
        "system": measured.system,
        "rate": measured.rate,
        "repetition": measured.repetition,
        "outcome": asdict(measured.outcome),
        "output_tokens_per_s": measured.tokens_per_s,
        "seconds": measured.round.seconds,
        "kept_by_service": measured.kept_by_service,
        "machine": asdict(measured.round.share),
        "generator_late_ms": {"p50": float(np.percentile(late_ms, 50)), "p99": float(np.percentile(late_ms, 99))},
        "misses": _misses(measured.round),
    }


def _misses(done: Round) -> list[dict[str, Any]]:
    """Every broken promise, with by how much."""
    found = []
    for call in done.calls:
        if call.promised_s is None:
            continue
        begin = 0
        late_ms = (call.token_s[0] - call.deadline_s) * 1e3 if call.token_s else None
        slow_ms = []
        for stage in call.call.stages:
            times = call.token_s[begin : begin + stage.tokens]
            begin += stage.tokens
            if len(times) > 1:
                slow_ms.append(((times[-1] - times[0]) / (len(times) - 1) - stage.tpot_s) * 1e3)
        if late_ms is None or late_ms > 0 or any(slow > 0 for slow in slow_ms) or not call.finished:
            found.append(
                {
                    "application": call.job.application,
                    "prompt_tokens": call.call.prompt_tokens,
                    "ttft_slo_ms": round(call.call.ttft_s * 1e3, 2),
                    "ttft_late_ms": None if late_ms is None else round(late_ms, 2),
                    "tpot_over_ms": [round(slow, 3) for slow in slow_ms],
                    "finished": call.finished,
                }
            )
    return found


def table(points: Sequence[Measured], what: str) -> str:
    """One row per system and load, repetitions averaged; a column per application."""
    applications = sorted({name for point in points for name in point.outcome.applications})
    header = [what, "met", *applications, "promised", "kept", "TTFT p50/p99 ms", "tokens/s", "other load, cores"]
    rows = []
    for system, rate in dict.fromkeys((point.system, point.rate) for point in points):
        mine = [point for point in points if (point.system, point.rate) == (system, rate)]
        rows.append(_row(system, rate, mine, applications))
    return markdown_table(header, rows)


def _row(system: str, rate: float, points: Sequence[Measured], applications: Sequence[str]) -> list[str]:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else float("nan")

    outcomes = [point.outcome for point in points]
    promised = sum(outcome.promised for outcome in outcomes)
    kept = sum(outcome.promised * outcome.kept for outcome in outcomes) / promised if promised else None
    shares = [mean([o.applications[name] for o in outcomes if name in o.applications]) for name in applications]
    return [
        f"{system}, {rate:.2f}/s",
        f"{mean([outcome.attainment for outcome in outcomes]):.3f}",
        *(f"{share:.3f}" for share in shares),
        str(promised) if promised else "",
        "" if kept is None else f"{kept:.3f}",
        f"{mean([o.ttft_p50_s for o in outcomes]) * 1e3:.0f} / {mean([o.ttft_p99_s for o in outcomes]) * 1e3:.0f}",
        f"{mean([point.tokens_per_s for point in points]):.0f}",
        f"{mean([point.round.share.others for point in points]):.2f}",
    ]


def attainment_plot(points: Sequence[Measured], title: str, path: Path) -> None:
    """Attainment over load, one line per system; the dots are single rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for system in dict.fromkeys(point.system for point in points):
        mine = [point for point in points if point.system == system]
        rates = sorted({point.rate for point in mine})
        means = [np.mean([p.outcome.attainment for p in mine if p.rate == rate]) for rate in rates]
        [line] = axes.plot(rates, means, label=system)
        dots = [(point.rate, point.outcome.attainment) for point in mine]
        axes.plot(*zip(*dots, strict=True), "o", color=line.get_color(), alpha=0.6)
    axes.axhline(_TARGET, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="load, jobs/s", ylabel="attainment (met)", title=title, ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
