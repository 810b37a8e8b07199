"""How long batches take: those in flight, those observed, and the performance model corrected by them."""

from collections import deque
from dataclasses import dataclass

from services.core.correction import OnlineCorrection
from services.core.perf_model import BatchShape, PerfModel

__all__ = ["StepTimer"]

_CORRECT_EVERY = 16
_LONGEST_STRETCH = 16  # batches
_ALIKE = 0.25  # of the longer of two batches
_PUBLISH_CHANGE = 0.02
_COMPARED = (BatchShape(1), BatchShape(4096))
_PUBLISH_MARGIN_S = 0.0005


@dataclass(frozen=True, slots=True)
class _InFlight:
    shape: BatchShape | None  # None: an empty batch
    started_s: float
    predicted_s: float
    ends_s: float  # as expected when it started


class StepTimer:
    """Follows batches from schedule to completion, in order, whatever the number in flight.

    A batch lasts from the completion of the one before it, or from its own start on an engine that was idle: the time
    the scheduler and the output path take between two batches is part of what a deadline sees, so it is part of the
    model. An empty batch takes no time: the one after it counts from its own start.

    With two batches in flight a completion is seen only once the next batch has been launched: where launching takes
    long, that is charged to the batch before. What corrects the model are stretches of batches that end where the one
    launched last is like the one they began with, so that as much was charged to them as was charged elsewhere. The
    last batch before the engine falls idle is not observed: nothing was launched while it ran, so that it seems shorter
    than it is.
    """

    def __init__(self, model: PerfModel | None) -> None:
        self.model = model
        self._correction = OnlineCorrection(model) if model is not None else None
        self._in_flight: deque[_InFlight] = deque()
        self._completed_s = float("-inf")
        self._busy = False
        self._launched = False  # since the last completion
        self._stretch: list[BatchShape] = []
        self._stretch_s = 0.0
        self._corrected_at = 0  # batches
        self._after_empty = False
        self._published = model
        self._observed: list[tuple[int, int, int, int, float, float]] = []
        self._changed = False
        self.free_at_s = float("-inf")

    def set_model(self, model: PerfModel) -> None:
        """Plan with `model` from now on, uncorrected."""
        self._correction = OnlineCorrection(model)
        self._published = None
        self._correct()

    def started(self, now_s: float, shape: BatchShape | None) -> float:
        """A batch was scheduled; when it is expected to complete."""
        predicted_s = self.model.seconds(shape) if shape is not None and self.model is not None else 0.0
        self.free_at_s = max(now_s, self.free_at_s) + predicted_s
        self._in_flight.append(_InFlight(shape, now_s, predicted_s, self.free_at_s))
        self._launched = self._launched or shape is not None
        return self.free_at_s

    def completed(self, now_s: float) -> None:
        """The oldest batch in flight is done."""
        batch = self._in_flight.popleft()
        from_start = not self._busy or self._after_empty
        if batch.shape is not None and (self._launched or from_start):
            seconds = now_s - (batch.started_s if from_start else self._completed_s)
            self._observe(batch.shape, seconds)
            if self._correction is not None:
                self._correction.ended(batch.shape, now_s - batch.ends_s)
        if self._stretch and self._stretch_is_whole():
            self._end_stretch()
        self._launched = False
        self._after_empty = batch.shape is None
        self._completed_s = now_s
        self.free_at_s = now_s + sum(later.predicted_s for later in self._in_flight)
        if self._after_empty and self._in_flight:  # the next one runs since its start
            ran_s = now_s - self._in_flight[0].started_s
            self.free_at_s -= min(ran_s, self._in_flight[0].predicted_s)

    def set_busy(self, busy: bool) -> None:
        """Whether the engine goes straight on after the batch that just completed."""
        self._busy = busy

    def take_observed(self) -> tuple[tuple[int, int, int, int, float, float], ...]:
        """Batches observed since the last call: the fields of their shape, and seconds."""
        observed, self._observed = tuple(self._observed), []
        return observed

    def take_model(self) -> PerfModel | None:
        """The model if it changed by more than a little since the last call."""
        if not self._changed:
            return None
        self._changed = False
        return self.model

    def _observe(self, shape: BatchShape, seconds: float) -> None:
        if seconds <= 0:
            return
        self._observed.append(
            (shape.tokens, shape.context_tokens, shape.requests, shape.draft_steps, shape.attended, seconds)
        )
        self._stretch.append(shape)
        self._stretch_s += seconds

    def _stretch_is_whole(self) -> bool:
        launched = next((later for later in self._in_flight if later.shape is not None), None)
        if launched is None or len(self._stretch) >= _LONGEST_STRETCH or self.model is None:
            return True
        begun_s = self.model.seconds(self._stretch[0])
        return abs(launched.predicted_s - begun_s) <= _ALIKE * max(launched.predicted_s, begun_s)

    def _end_stretch(self) -> None:
        """Correct the model by the batches since the last stretch."""
        stretch, seconds = self._stretch, self._stretch_s
        self._stretch, self._stretch_s = [], 0.0
        if self._correction is None or not stretch:
            return
        self._correction.observe(stretch, seconds)
        steps = self._correction.steps
        if steps < _CORRECT_EVERY or steps - self._corrected_at >= _CORRECT_EVERY:
            self._corrected_at = steps
            self._correct()

    def _correct(self) -> None:
        """Plan with the model as it is now; it is published where that makes more than a little difference."""
        if self._correction is None:
            return
        self.model = self._correction.applied()
        if self._published is None or _differ(self._published, self.model):
            self._published = self.model
            self._changed = True


def _differ(one: PerfModel, other: PerfModel) -> bool:
    """Whether batches take more than a little longer in one model, or its margin is another."""
    if abs(one.margin_s - other.margin_s) > _PUBLISH_MARGIN_S:
        return True
    times = ((one.seconds(shape), other.seconds(shape)) for shape in _COMPARED)
    return any(abs(this - that) > _PUBLISH_CHANGE * that for this, that in times)
