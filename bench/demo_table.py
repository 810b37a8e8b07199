"""The demo's final table: per application what was asked, promised and delivered."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.demo_outcome import ApplicationSummary, Quantiles

__all__ = ["render_table"]


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _delivered(quantiles: Quantiles | None, slo_p99_ms: float | None) -> Text:
    if quantiles is None:
        return Text("-")
    late = slo_p99_ms is not None and quantiles.p99_ms > slo_p99_ms
    return Text.assemble(_ms(quantiles.p50_ms), " / ", (_ms(quantiles.p99_ms), "yellow" if late else "green"))


def _asked_ttft(slo: Quantiles | None) -> str:
    if slo is None:
        return "-"
    low, high = _ms(slo.p50_ms), _ms(slo.p99_ms)
    return low if low == high else f"{low} / {high}"


def _share(part: int, whole: int) -> Text:
    if whole == 0:
        return Text("-", style="dim")
    share = part / whole
    return Text(f"{share:.0%}", style="green" if share >= 0.9 else "yellow" if share >= 0.5 else "red")


def _count(value: int, style: str) -> Text:
    return Text(str(value), style=style if value else "dim")


def render_table(summaries: Sequence[ApplicationSummary]) -> RenderableType:
    """The table with a line for all applications together, and a legend."""
    table = Table(header_style="dim", box=None, padding=(0, 1))
    table.add_column("application")
    for header in ("offered", "admitted", "best effort", "rejected", "failed"):
        table.add_column(header, justify="right")
    table.add_column("TTFT ms\np50 / p99", justify="right")
    table.add_column("its SLO\np50 / p99", justify="right")
    table.add_column("TPOT ms\np50 / p99", justify="right")
    table.add_column("its SLO", justify="right")
    table.add_column("attained", justify="right")
    table.add_column("promises\nkept", justify="right")
    for row in summaries:
        table.add_row(
            Text(row.application, style="bold"),
            str(row.offered),
            _count(row.admitted, "green"),
            _count(row.best_effort, "yellow"),
            _count(row.rejected, "red"),
            _count(row.failed, "red"),
            _delivered(row.ttft, row.ttft_slo.p99_ms if row.ttft_slo else None),
            _asked_ttft(row.ttft_slo),
            _delivered(row.tpot, row.tpot_slo_ms),
            _ms(row.tpot_slo_ms) if row.tpot_slo_ms else "-",
            _share(row.attained, row.offered),
            _kept(row.kept, row.promises),
        )
    table.add_section()
    table.add_row(*_totals(summaries))
    legend = Text(
        "attained: share of offered requests whose every stage met its SLO, promised or not. TTFT SLOs are multiples "
        "of each prompt's own zero-load prefill time, so they differ. Times are those at which admission sent tokens.",
        style="dim",
    )
    return Group(table, legend)


def _kept(kept: int, promises: int) -> Text:
    if promises == 0:
        return Text("none made", style="dim")
    return Text(f"{kept}/{promises}", style="green" if kept == promises else "red")


def _totals(summaries: Sequence[ApplicationSummary]) -> list[Text | str]:
    offered = sum(row.offered for row in summaries)
    return [
        Text("all", style="bold"),
        str(offered),
        str(sum(row.admitted for row in summaries)),
        str(sum(row.best_effort for row in summaries)),
        str(sum(row.rejected for row in summaries)),
        str(sum(row.failed for row in summaries)),
        "",
        "",
        "",
        "",
        _share(sum(row.attained for row in summaries), offered),
        _kept(sum(row.kept for row in summaries), sum(row.promises for row in summaries)),
    ]
