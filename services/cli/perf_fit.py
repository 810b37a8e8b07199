"""How a performance model compares with the batches it describes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protos import worker_pb2
from services.common.wire import perf_model_from_wire
from services.core.perf_model import BatchShape, PerfModel

__all__ = ["Compared", "FitView", "fit_view", "r2_of"]


@dataclass(frozen=True, slots=True)
class Compared:
    """One batch, milliseconds: what the model predicts and what it took. `kind`: `fitted`, `heldout` or `recent`."""

    predicted_ms: float
    observed_ms: float
    kind: str

    @property
    def residual_ms(self) -> float:
        """How much longer than predicted it took."""
        return self.observed_ms - self.predicted_ms


@dataclass(frozen=True, slots=True)
class FitView:
    """A replica's batches beside its model. Batches of the profile are compared with the model as fitted, recent ones
    with the model in force, which follows them.
    """

    replica_id: str
    profiled: tuple[Compared, ...]
    recent: tuple[Compared, ...]
    samples: int
    margin_ms: float

    @property
    def batches(self) -> tuple[Compared, ...]:
        """What there is to plot: the profile's batches, or the recent ones where the engine was not profiled."""
        return self.profiled or self.recent


def fit_view(answer: worker_pb2.ProfileResponse) -> FitView:
    """Compare what a worker measured with what its model says."""
    fitted, current = perf_model_from_wire(answer.fitted), perf_model_from_wire(answer.current)
    return FitView(
        replica_id=answer.replica_id,
        profiled=tuple(_compared(fitted, answer.profiled)),
        recent=tuple(_compared(current, answer.recent, kind="recent")),
        samples=answer.samples,
        margin_ms=current.margin_s * 1000,
    )


def r2_of(batches: Sequence[Compared]) -> float:
    """Share of the variance of observed times that the model explains; NaN where they do not vary."""
    if not batches:
        return math.nan
    mean_ms = sum(batch.observed_ms for batch in batches) / len(batches)
    total = sum((batch.observed_ms - mean_ms) ** 2 for batch in batches)
    return 1.0 - sum(batch.residual_ms**2 for batch in batches) / total if total > 0 else math.nan


def _compared(
    model: PerfModel, batches: Iterable[worker_pb2.MeasuredBatch], kind: str | None = None
) -> Iterable[Compared]:
    for batch in batches:
        shape = BatchShape(batch.tokens, batch.context_tokens, batch.requests, batch.draft_steps, batch.attended)
        drawn = kind or ("heldout" if batch.heldout else "fitted")
        yield Compared(model.seconds(shape) * 1000, batch.seconds * 1000, drawn)
