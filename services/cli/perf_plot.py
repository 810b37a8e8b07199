"""A performance model beside the batches it describes: in the terminal, and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.text import Text

from services.cli.asynchronous import CommandError
from services.cli.perf_fit import Compared, FitView, r2_of
from services.cli.scatter import Point, scatter

__all__ = ["save_picture", "text_plot"]

_MARKS = {"fitted": "o", "heldout": "x", "recent": "+"}
_STYLES = {"o": "cyan", "x": "yellow", "+": "green", "·": "dim", "─": "dim"}
_LABELS = {"fitted": "fitted", "heldout": "held out", "recent": "in service, model in force"}
_COLOURS = {"fitted": "tab:blue", "heldout": "tab:orange", "recent": "tab:green"}
_HEIGHT, _RESIDUAL_HEIGHT = 16, 9
_AXIS = 9  # characters left of the plot
_SPREAD = 0.98  # quantile of |residual| that the residual plot reaches to; the rest is on its border


def text_plot(view: FitView, width: int) -> Group:
    """Observed over predicted batch time, then the residuals, for a terminal of `width`."""
    batches = view.batches
    if not batches:
        return Group(Text("no batches measured yet", style="dim"))
    cells = max(20, min(100, width - _AXIS - 2))
    top_ms = max(max(b.predicted_ms, b.observed_ms) for b in batches)
    spread_ms = _spread_ms(batches)
    line = [Point(top_ms * i / cells, top_ms * i / cells, "·") for i in range(cells + 1)]
    zero = [Point(top_ms * i / cells, 0.0, "─") for i in range(cells + 1)]
    upper = scatter(
        [*line, *(Point(b.predicted_ms, b.observed_ms, _MARKS[b.kind]) for b in batches)],
        width=cells, height=_HEIGHT, x_range=(0.0, top_ms), y_range=(0.0, top_ms),
    )  # fmt: skip
    lower = scatter(
        [*zero, *(Point(b.predicted_ms, b.residual_ms, _MARKS[b.kind]) for b in batches)],
        width=cells, height=_RESIDUAL_HEIGHT, x_range=(0.0, top_ms), y_range=(-spread_ms, spread_ms),
    )  # fmt: skip
    return Group(
        _legend(batches),
        *_panel("observed ms", upper, f"{top_ms:.1f}", "0"),
        *_panel("observed - predicted ms", lower, f"{spread_ms:+.1f}", f"{-spread_ms:+.1f}"),
        Text(f"{'0':>{_AXIS + 1}}{f'predicted {top_ms:.1f} ms':>{cells}}", style="dim"),
    )


def save_picture(view: FitView, path: Path) -> None:
    """The same as a picture whose kind its suffix names. `CommandError` where it cannot be drawn or written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CommandError("--plot needs matplotlib, which this installation leaves out") from None
    batches = view.batches
    if not batches:
        raise CommandError(f"replica {view.replica_id} has measured no batches yet: nothing to plot")
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind in _MARKS:
        chosen = [b for b in batches if b.kind == kind]
        if chosen:
            label = f"{_LABELS[kind]} ({len(chosen)}, R2 {r2_of(chosen):.3f})"
            style = {"s": 14, "alpha": 0.6, "color": _COLOURS[kind], "label": label}
            left.scatter([b.predicted_ms for b in chosen], [b.observed_ms for b in chosen], **style)
            right.scatter([b.predicted_ms for b in chosen], [b.residual_ms for b in chosen], **style)
    top_ms = max(max(b.predicted_ms, b.observed_ms) for b in batches)
    left.plot([0, top_ms], [0, top_ms], color="black", linewidth=0.8)
    left.set(xlabel="predicted ms", ylabel="observed ms", title=f"{view.replica_id}: batch time", xlim=0, ylim=0)
    left.legend()
    right.axhline(0, color="black", linewidth=0.8)
    right.axhline(
        view.margin_ms, color="tab:red", linewidth=0.8, linestyle="--", label=f"margin {view.margin_ms:.2f} ms"
    )
    right.set(xlabel="predicted ms", ylabel="observed - predicted ms", title="residuals", xlim=0)
    right.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write {path}: {error}") from None


def _spread_ms(batches: Sequence[Compared]) -> float:
    residuals = sorted(abs(b.residual_ms) for b in batches)
    return max(0.01, residuals[min(len(residuals) - 1, int(_SPREAD * len(residuals)))])


def _legend(batches: Sequence[Compared]) -> Text:
    text = Text()
    for kind, mark in _MARKS.items():
        chosen = [b for b in batches if b.kind == kind]
        if chosen:
            text.append(f"{mark} ", style=_STYLES[mark]).append(
                f"{_LABELS[kind]}: {len(chosen)}, R2 {r2_of(chosen):.4f}   "
            )
    return text


def _panel(title: str, rows: Sequence[str], top: str, bottom: str) -> list[Text]:
    """Rows with an axis left of them."""
    lines = [Text(f"{'':>{_AXIS}} {title}", style="dim")]
    for index, row in enumerate(rows):
        label = top if index == 0 else bottom if index == len(rows) - 1 else ""
        line = Text(f"{label:>{_AXIS - 1}} ┤" if label else f"{'':>{_AXIS}}│", style="dim")
        for mark in row:
            line.append(mark, style=_STYLES.get(mark, ""))
        lines.append(line)
    return lines
