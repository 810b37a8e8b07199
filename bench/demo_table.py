"""The demo's final tables: per application what was asked and promised, and what was delivered."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.demo_outcome import ApplicationSummary

__all__ = ["render_tables"]

_LEGEND = """\
attained  share of offered requests that met every SLO, promised or not
its SLO   TTFT SLOs are multiples of the zero-load prefill time of each prompt
times     as admission sent the tokens; p99 of so few is close to the largest"""


def render_tables(summaries: Sequence[ApplicationSummary]) -> RenderableType:
    """Verdicts and attainment, then latencies against their SLOs, then what the words mean."""
    return Group(_verdicts(summaries), Text(), _latencies(summaries), Text(), Text(_LEGEND, style="dim"))


def _table(headers: Sequence[str], gap: int) -> Table:
    table = Table(header_style="dim", box=None, padding=(0, 0, 0, gap))
    table.add_column(headers[0], no_wrap=True, min_width=11)
    for header in headers[1:]:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _verdicts(summaries: Sequence[ApplicationSummary]) -> Table:
    table = _table(
        ("application", "offered", "admitted", "best effort", "rejected", "failed", "attained", "promises"), gap=1
    )
    for row in summaries:
        table.add_row(
            Text(row.application, style="bold"),
            str(row.offered),
            _count(row.admitted, "green"),
            _count(row.best_effort, "yellow"),
            _count(row.rejected, "red"),
            _count(row.failed, "red"),
            _share(row.attained, row.offered),
            _kept(row.kept, row.promises),
        )
    offered = sum(row.offered for row in summaries)
    table.add_row(
        Text("all", style="bold"),
        str(offered),
        *(
            str(sum(counts))
            for counts in zip(*((r.admitted, r.best_effort, r.rejected, r.failed) for r in summaries), strict=True)
        ),
        _share(sum(row.attained for row in summaries), offered),
        _kept(sum(row.kept for row in summaries), sum(row.promises for row in summaries)),
    )
    return table


def _latencies(summaries: Sequence[ApplicationSummary]) -> Table:
    table = _table(("milliseconds", "TTFT p50", "p99", "its SLO p50", "p99", "TPOT p50", "p99", "its SLO"), gap=2)
    for row in summaries:
        table.add_row(
            Text(row.application, style="bold"),
            _ms(row.ttft.p50_ms, row.ttft_slo.p50_ms),
            _ms(row.ttft.p99_ms, row.ttft_slo.p99_ms),
            _ms(row.ttft_slo.p50_ms),
            _ms(row.ttft_slo.p99_ms),
            _ms(row.tpot.p50_ms, row.tpot_slo_ms),
            _ms(row.tpot.p99_ms, row.tpot_slo_ms),
            _ms(row.tpot_slo_ms or None),
        )
    return table


def _ms(value: float | None, slo: float | None = None) -> Text:
    """A time, yellow where it is over the SLO's same quantile."""
    if value is None:
        return Text("-", style="dim")
    style = "" if slo is None else "yellow" if value > slo else "green"
    return Text(f"{value:.1f}" if value < 10 else f"{value:,.0f}", style=style)


def _share(part: int, whole: int) -> Text:
    if whole == 0:
        return Text("-", style="dim")
    share = part / whole
    return Text(f"{share:.0%}", style="green" if share >= 0.9 else "yellow" if share >= 0.5 else "red")


def _kept(kept: int, promises: int) -> Text:
    if promises == 0:
        return Text("none made", style="dim")
    return Text(f"{kept}/{promises} kept", style="green" if kept == promises else "red")


def _count(value: int, style: str) -> Text:
    return Text(str(value), style=style if value else "dim")
