"""Following a replica whose batches take longer, or shorter, than its fitted model says.

Two numbers are followed by least squares with forgetting: a scale, for a machine that computes more slowly, and an
offset per batch, for time lost between batches, to a busy scheduler or to other processes. Both are drawn to where they
start (1 and 0) as strongly as one batch in a hundred or so, which decides between them while all batches are alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.core.perf_model import BatchShape, PerfModel, Segment

__all__ = ["OnlineCorrection"]

_FORGET = 0.99  # of what is known, kept per batch
_PRIOR = 0.2
_AT_FIRST = 2.0  # more of it, forgotten like batches: the first ones after a start are cold and say little
_LEAST_SCALE = 0.1
_OUTLIER = 4.0  # times what was expected: a paused process
_LONGEST_KEPT = 1 - 1 / 4096  # of the longest batch so far, per batch
_QUANTILE = 0.95
_LATENESS_SHARE = 0.05  # of a new one in the typical one
_MARGIN_STEP = 0.2  # of the typical lateness: long batches may be rare


@dataclass(slots=True)
class OnlineCorrection:
    """How `model` has to be corrected to say what batches take now.

    A batch is expected to take `scale * predicted + offset_s`. Errors are weighed relative to the time of the batch
    plus that of an empty one, as in the fit. `margin_s` is a stochastic-approximation quantile of how late batches
    end: up by `step * quantile` when exceeded, down by `step * (1 - quantile)` when not, the step proportional to the
    typical lateness. It is learnt from long batches only, those at least half as long as the longest lately: lateness
    grows with the batch, it is the long ones that are planned to end right at a deadline, and short ones are many.
    """

    model: PerfModel
    scale: float = 1.0
    offset_s: float = 0.0
    margin_s: float = field(init=False)
    steps: int = field(default=0, init=False)
    _fixed_s: float = field(init=False)
    _normal: tuple[float, float, float] = field(default=(_AT_FIRST, 0.0, _AT_FIRST), init=False)
    _seen: tuple[float, float] = field(default=(_AT_FIRST, 0.0), init=False)
    _longest_s: float = field(default=0.0, init=False)
    _spread_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.margin_s = self.model.margin_s
        self._spread_s = self.model.margin_s / 2  # the mean deviation where 95 % stay below the margin
        self._fixed_s = max(1e-6, self.model.seconds(BatchShape(0)))

    def observe(self, shapes: Sequence[BatchShape], observed_s: float) -> None:
        """Batches that followed each other and took `observed_s` together; one, where each one's time is known.

        Beyond four times of what was expected (a paused process) they count as four times.
        """
        count = len(shapes)
        mean_s, observed_s = sum(self.model.seconds(shape) for shape in shapes) / count, observed_s / count
        if mean_s <= 0 or not math.isfinite(observed_s):
            return
        self.steps += count
        observed_s = min(observed_s, _OUTLIER * (self.scale * mean_s + self.offset_s))
        self._follow(mean_s, observed_s, count)

    def ended(self, shape: BatchShape, late_s: float) -> None:
        """A batch ended `late_s` later than it was expected to when it was formed.

        With batches in flight before it that is not only its own residual, but what a first token in it was late. More
        than three times what it takes itself counts as so much.
        """
        predicted_s = self.model.seconds(shape)
        self._longest_s = max(predicted_s, self._longest_s * _LONGEST_KEPT)
        if math.isfinite(late_s) and predicted_s >= self._longest_s / 2:
            self._learn_margin(min(late_s, (_OUTLIER - 1) * (self.scale * predicted_s + self.offset_s)))

    def applied(self) -> PerfModel:
        """The model as it is observed to be now."""
        segments = tuple(
            Segment(
                s.k_tok * self.scale,
                s.k_ctx * self.scale,
                s.k_req * self.scale,
                s.k_step * self.scale,
                max(0.0, s.b * self.scale + self.offset_s),
            )
            for s in self.model.segments
        )
        return PerfModel(segments, self.margin_s, self.model.r2, self.model.attention)

    def _follow(self, predicted_s: float, observed_s: float, count: int) -> None:
        """Least squares for (scale, offset as a share of an empty batch), by the normal equations; `count` alike."""
        whole_s = predicted_s + self._fixed_s
        x, y, z = predicted_s / whole_s, self._fixed_s / whole_s, observed_s / whole_s
        xx, xy, yy = self._normal
        xz, yz = self._seen
        kept = _FORGET**count
        xx, xy, yy = self._normal = kept * xx + count * x * x, kept * xy + count * x * y, kept * yy + count * y * y
        xz, yz = self._seen = kept * xz + count * x * z, kept * yz + count * y * z
        xx, yy, xz = xx + _PRIOR, yy + _PRIOR, xz + _PRIOR
        determinant = xx * yy - xy * xy
        self.scale = max(_LEAST_SCALE, (xz * yy - yz * xy) / determinant)
        self.offset_s = max(-self.scale, (yz * xx - xz * xy) / determinant) * self._fixed_s

    def _learn_margin(self, late_s: float) -> None:
        self._spread_s += _LATENESS_SHARE * (abs(late_s) - self._spread_s)
        step_s = max(self._spread_s, 1e-6) * _MARGIN_STEP
        up = late_s > self.margin_s
        self.margin_s = max(0.0, self.margin_s + step_s * (_QUANTILE if up else _QUANTILE - 1.0))
