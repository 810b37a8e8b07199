"""A scatter plot in characters."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Point", "scatter"]


@dataclass(frozen=True, slots=True)
class Point:
    """One point and the single character it is drawn with."""

    x: float
    y: float
    mark: str


def scatter(
    points: Sequence[Point], *, width: int, height: int, x_range: tuple[float, float], y_range: tuple[float, float]
) -> list[str]:
    """`height` lines of `width` characters, the largest y first.

    Points outside the ranges are drawn on the border. Where several fall on one character, the last one is seen.
    """
    rows = [[" "] * width for _ in range(height)]
    for point in points:
        column = _cell(point.x, x_range, width)
        row = height - 1 - _cell(point.y, y_range, height)
        rows[row][column] = point.mark
    return ["".join(row) for row in rows]


def _cell(value: float, of: tuple[float, float], cells: int) -> int:
    low, high = of
    share = (value - low) / (high - low) if high > low else 0.5
    return min(cells - 1, max(0, round(share * (cells - 1))))
