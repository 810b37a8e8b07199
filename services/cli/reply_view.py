"""A verdict as one line and a finished request as a table of promised against delivered."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from services.client import Finished, StageReport, Verdict

__all__ = ["finish_line", "stage_table", "verdict_line", "verdict_word"]

_STYLES = {"PENDING": "cyan", "ADMITTED": "bold green", "BEST_EFFORT": "bold yellow"}


def verdict_word(verdict: Verdict) -> Text:
    """The kind of a verdict, coloured."""
    return Text(verdict.kind.replace("_", " "), style=_STYLES.get(verdict.kind, "bold red"))


def verdict_line(verdict: Verdict) -> Text:
    """What was promised, or why nothing was."""
    line = Text.assemble(verdict_word(verdict))
    if verdict.kind == "ADMITTED":
        line.append(f" on {verdict.replica_id}, tier {verdict.tier}: ")
        line.append(f"TTFT {verdict.predicted_ttft_ms:.0f} of {verdict.ttft_slo_ms:.0f} ms, ")
        line.append(f"TPOT {verdict.predicted_tpot_ms:.1f} of {verdict.tpot_slo_ms:.0f} ms (predicted of promised)")
    elif verdict.constraint is not None:
        line.append(f": {verdict.constraint.detail or verdict.constraint.kind}")
    return line


def _against(value_ms: float, slo_ms: float) -> Text:
    if slo_ms <= 0:
        return Text("-", style="dim")
    return Text.assemble((f"{value_ms:.1f}", "green" if value_ms <= slo_ms else "red"), f" of {slo_ms:.0f}")


def stage_table(stages: Sequence[StageReport]) -> Table:
    """One line per stage: delivered of promised."""
    table = Table(box=None, header_style="dim")
    table.add_column("stage")
    for header in ("tokens", "TTFT ms", "TPOT ms"):
        table.add_column(header, justify="right")
    table.add_column("SLO")
    for stage in stages:
        table.add_row(
            stage.kind,
            str(stage.output_tokens),
            _against(stage.ttft_ms, stage.ttft_slo_ms),
            _against(stage.tpot_ms, stage.tpot_slo_ms),
            Text("met", style="green") if stage.met else Text("missed", style="red"),
        )
    return table


def finish_line(finished: Finished) -> Text:
    """How it ended, and where its trace is."""
    if finished.promised:
        promise = ("promise kept", "green") if finished.met else ("promise broken", "bold red")
    else:
        promise = ("no promise, SLO met", "green") if finished.met else ("no promise, SLO missed", "yellow")
    line = Text.assemble(promise, f"; {finished.prompt_tokens} tokens in, {finished.output_tokens} out")
    line.append(f" (ended by {finished.reason}), replica {finished.replica_id}")
    if finished.attempts > 1:
        line.append(f", attempt {finished.attempts}")
    line.append(f"\nslosctl trace {finished.trace_id}", style="dim")
    return line
