"""A verdict as one line and a finished request as a table of promised against delivered."""

from rich.table import Table
from rich.text import Text

from protos import admission_pb2, types_pb2

__all__ = ["finish_line", "stage_table", "verdict_line"]

_KINDS: dict[int, tuple[str, str]] = {
    types_pb2.VERDICT_KIND_PENDING: ("PENDING", "cyan"),
    types_pb2.VERDICT_KIND_ADMITTED: ("ADMITTED", "bold green"),
    types_pb2.VERDICT_KIND_BEST_EFFORT: ("BEST EFFORT", "bold yellow"),
    types_pb2.VERDICT_KIND_REJECTED: ("REJECTED", "bold red"),
}


def verdict_line(verdict: types_pb2.Verdict) -> Text:
    """What was promised, or why nothing was."""
    name, style = _KINDS.get(verdict.kind, ("no verdict", "red"))
    line = Text.assemble((name, style))
    if verdict.kind == types_pb2.VERDICT_KIND_ADMITTED:
        line.append(f" on {verdict.replica_id}, tier {verdict.tier}: ")
        line.append(f"TTFT {verdict.predicted_ttft_ms:.0f} of {verdict.ttft_slo_ms:.0f} ms, ")
        line.append(f"TPOT {verdict.predicted_tpot_ms:.1f} of {verdict.tpot_slo_ms:.0f} ms (predicted of promised)")
    elif verdict.constraint.detail:
        line.append(f": {verdict.constraint.detail}")
    elif verdict.constraint.kind:
        line.append(f": {types_pb2.ConstraintKind.Name(verdict.constraint.kind).removeprefix('CONSTRAINT_KIND_')}")
    return line


def _against(value_ms: float, slo_ms: float) -> Text:
    if slo_ms <= 0:
        return Text("-", style="dim")
    return Text.assemble((f"{value_ms:.1f}", "green" if value_ms <= slo_ms else "red"), f" of {slo_ms:.0f}")


def stage_table(finished: admission_pb2.Finished) -> Table:
    """One line per stage: delivered of promised."""
    table = Table(box=None, header_style="dim")
    table.add_column("stage")
    for header in ("tokens", "TTFT ms", "TPOT ms"):
        table.add_column(header, justify="right")
    table.add_column("SLO")
    for stage in finished.stages:
        table.add_row(
            types_pb2.StageKind.Name(stage.kind).removeprefix("STAGE_KIND_").lower().replace("_", " "),
            str(stage.output_tokens),
            _against(stage.ttft_ms, stage.ttft_slo_ms),
            _against(stage.tpot_ms, stage.tpot_slo_ms),
            Text("met", style="green") if stage.met else Text("missed", style="red"),
        )
    return table


def finish_line(finished: admission_pb2.Finished) -> Text:
    """How it ended, and where its trace is."""
    reason = types_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
    if finished.promised:
        promise = ("promise kept", "green") if finished.met else ("promise broken", "bold red")
    else:
        promise = ("no promise, SLO met", "green") if finished.met else ("no promise, SLO missed", "yellow")
    line = Text.assemble(
        promise, f"; ended by {reason}, {finished.prompt_tokens} tokens in, {finished.output_tokens} out"
    )
    line.append(f", replica {finished.replica_id}")
    if finished.attempts > 1:
        line.append(f", attempt {finished.attempts}")
    line.append(f"\nslosctl trace {finished.trace_id}", style="dim")
    return line
