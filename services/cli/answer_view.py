"""A quote as a few lines, and an explanation as sentences with the replicas' answers."""

import time

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.cli.reply_view import stage_table, verdict_word
from services.client import Explanation, HopReport, Quote, Verdict

__all__ = ["explanation_view", "quote_view"]


def quote_view(quote: Quote, now_us: int) -> RenderableType:
    """Whether it fits, and what would. `now_us`: Unix microseconds, for how far away the earliest time is."""
    verdict = quote.verdict
    if quote.fits:
        line = Text.assemble(("FITS", "bold green"), f" on {verdict.replica_id}, tier {verdict.tier}: ")
        line.append(f"TTFT {verdict.predicted_ttft_ms:.0f} of {verdict.ttft_slo_ms:.0f} ms, ")
        line.append(f"TPOT {verdict.predicted_tpot_ms:.1f} of {verdict.tpot_slo_ms:.0f} ms (predicted of asked)")
    else:
        line = Text.assemble(("DOES NOT FIT NOW", "bold yellow"), f": {_constraint(verdict)}")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    asked = f"TTFT {verdict.ttft_slo_ms:.0f} ms, TPOT {verdict.tpot_slo_ms:.0f} ms"
    table.add_row("asked for", asked)
    table.add_row("tightest TTFT", f"{_or_none(quote.tightest_ttft_ms)} with the TPOT as asked")
    table.add_row("tightest TPOT", f"{_or_none(quote.tightest_tpot_ms)} with the TTFT as asked")
    table.add_row("earliest", _when(quote, now_us))
    return Group(line, table)


def explanation_view(request_id: str, said: Explanation) -> RenderableType:
    """Its state and verdict, why, what each replica said, and promised against delivered."""
    head = Text.assemble((request_id, "bold"), f": {said.state}")
    if said.verdict.kind != "UNSPECIFIED":  # it is being placed
        head.append(", ").append_text(verdict_word(said.verdict))
    parts: list[RenderableType] = [head, *(Text(f"- {sentence}") for sentence in said.why)]
    if said.hops:
        parts.append(_hop_table(said.hops))
    if said.stages:
        parts.append(stage_table(said.stages))
    return Group(*parts)


def _hop_table(hops: tuple[HopReport, ...]) -> Table:
    table = Table(box=None, header_style="dim")
    table.add_column("replica", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for header in ("TTFT ms", "needed", "available"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("constraint")
    for hop in hops:
        limit = hop.verdict.constraint
        predicted = f"{hop.verdict.predicted_ttft_ms:.0f}" if hop.verdict.predicted_ttft_ms else "-"
        numbers = (f"{limit.needed:.0f}", f"{limit.available:.0f}") if limit else ("-", "-")
        name = limit.kind.lower().replace("_", " ") if limit else "-"
        table.add_row(hop.replica_id, verdict_word(hop.verdict), predicted, *numbers, name)
    return table


def _constraint(verdict: Verdict) -> str:
    limit = verdict.constraint
    return "no reason was given" if limit is None else limit.detail or limit.kind


def _or_none(value_ms: float | None) -> str:
    return "none" if value_ms is None else f"{value_ms:.0f} ms"


def _when(quote: Quote, now_us: int) -> str:
    if quote.fits:
        return "now"
    if quote.earliest_us is None:
        return "not known"
    clock = time.strftime("%H:%M:%S", time.localtime(quote.earliest_us / 1e6))
    return f"in {max(0.0, (quote.earliest_us - now_us) / 1e6):.1f} s ({clock})"
