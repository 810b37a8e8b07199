"""Fitting the roofline model to profiled batches.

A fit is constrained least squares (coefficients >= 0). Two segments are fitted by alternation: every sample belongs to
the segment that predicts more, each segment is refitted to its own samples, and all of it repeats until the split is
stable. One segment or two is decided by the error on held-out samples, with one unless two are clearly better.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.core.errors import BadModelError, NotEnoughSamplesError
from services.core.nnls import solve_nnls
from services.core.perf_model import BatchShape, PerfModel, Segment

__all__ = ["FitResult", "Sample", "fit"]

Floats = NDArray[np.float64]

_MIN_SAMPLES = 8
_ROUNDS = 30
_CLEARLY_BETTER = 0.97
_FLAT = 1e-12
_SEARCHED = range(-12, 4)  # powers of two
_NARROWED = 6  # times by a third


@dataclass(frozen=True, slots=True)
class Sample:
    """One observed batch and how long it took, seconds."""

    shape: BatchShape
    seconds: float


@dataclass(frozen=True, slots=True)
class FitResult:
    """A fitted model and how good it is.

    `r2_train` and `r2_heldout` are coefficients of determination; `margin_s` (also in the model) is the quantile of
    `observed - predicted` on held-out batches, never negative. `heldout` are the indices, in the samples given to
    `fit`, of those that only judged.
    """

    model: PerfModel
    r2_train: float
    r2_heldout: float
    margin_s: float
    samples: int
    heldout: frozenset[int] = frozenset()


def fit(samples: Sequence[Sample], *, margin_quantile: float = 0.95, heldout_every: int = 4) -> FitResult:
    """Fit a performance model; every `heldout_every`-th sample (by batch time) only judges.

    Raises NotEnoughSamplesError for fewer than 8 samples or batches that are all alike, BadModelError for times that
    are not positive numbers.
    """
    if len(samples) < _MIN_SAMPLES:
        raise NotEnoughSamplesError(f"{len(samples)} samples; at least {_MIN_SAMPLES} are needed")
    x, y, attended = _design(samples)
    if not (np.isfinite(y).all() and (y > 0).all()):
        raise BadModelError("sample times must be positive numbers of seconds")
    if np.ptp(x[:, 0]) == 0:
        raise NotEnoughSamplesError("all samples have the same number of tokens")
    order = np.argsort(y, kind="stable")
    held = np.zeros(len(y), np.bool_)
    held[order[heldout_every // 2 :: heldout_every]] = True
    attention = _fit_attention(x[~held], y[~held], attended[~held])
    x[:, 0] += attention * attended
    one, two = _fit_both(x[~held], y[~held])
    best = one
    if two is not None and _error(two, x[held], y[held]) < _CLEARLY_BETTER * _error(one, x[held], y[held]):
        best = two
    residual = y[held] - _predict(best, x[held])
    margin_s = max(0.0, float(np.quantile(residual, margin_quantile)))
    r2_heldout = _r2(best, x[held], y[held])
    model = PerfModel(tuple(Segment(*map(float, row)) for row in best), margin_s, r2_heldout, attention)
    judged = frozenset(map(int, np.flatnonzero(held)))
    return FitResult(model, _r2(best, x[~held], y[~held]), r2_heldout, margin_s, len(samples), judged)


def _design(samples: Sequence[Sample]) -> tuple[Floats, Floats, Floats]:
    shapes = [s.shape for s in samples]
    x = np.array([[s.tokens, s.context_tokens, s.requests, s.draft_steps, 1.0] for s in shapes], np.float64)
    attended = np.array([s.attended for s in shapes], np.float64)
    return x, np.array([s.seconds for s in samples], np.float64), attended


def _fit_attention(x: Floats, y: Floats, attended: Floats) -> float:
    """What a token before a prompt token adds to its cost, as a share of its own; one value for all segments.

    One segment with a column of its own for attended pairs gives it where a second one does not make the fit clearly
    better. Where it does, what one leaves out looks like attention: then the value is searched for with which both
    together fit best, and is 0 unless that is clearly better than none.
    """
    if not attended.any():
        return 0.0
    weight = 1.0 / (y + float(np.median(y)))
    row = solve_nnls(np.column_stack((x, attended)) * weight[:, None], y * weight)
    alone = float(row[-1] / row[0]) if row[0] > _FLAT else 0.0

    def errors_with(attention: float) -> tuple[float, float]:
        """Of one segment, and of two."""
        work = x.copy()
        work[:, 0] += attention * attended
        one, two = _fit_both(work, y)
        error = _error(one, work, y)
        return error, error if two is None else _error(two, work, y)

    def error(attention: float) -> float:
        return min(errors_with(attention))

    of_one, of_two = errors_with(alone)
    if of_two >= _CLEARLY_BETTER * of_one:
        return alone
    dearest = float(x[:, 0].max()) / float(attended.max())  # with it, attention is half of such a batch
    candidates = [0.0, alone, *(dearest * 2.0**power for power in _SEARCHED)]
    errors = [error(candidate) for candidate in candidates]
    found = candidates[int(np.argmin(errors))]
    low, high = found / 2, found * 2
    for _ in range(_NARROWED if found else 0):
        third = (high / low) ** (1 / 3)
        low, high = (low, high / third) if error(low * third) < error(high / third) else (low * third, high)
    narrowed = float(np.sqrt(low * high))
    if error(narrowed) < min(errors):
        found = narrowed
    return found if error(found) < _CLEARLY_BETTER * errors[0] else 0.0


def _fit_both(x: Floats, y: Floats) -> tuple[Floats, Floats | None]:
    """One segment, and two where there are samples enough for them."""
    one = _fit_one(x, y)
    return one, _fit_two(x, y, one)


def _fit_one(x: Floats, y: Floats) -> Floats:
    # Relative errors: a short batch mispredicted by half is worse than a long one mispredicted by a millisecond.
    weight = 1.0 / (y + float(np.median(y)))
    row = solve_nnls(x * weight[:, None], y * weight)
    row[0] = max(row[0], _FLAT)
    return row[None, :]


def _fit_two(x: Floats, y: Floats, one: Floats) -> Floats | None:
    """Two segments, started from a split at the median batch size; None if one of them starves."""
    best: Floats | None = None
    best_error = _error(one, x, y)
    for share in (0.25, 0.5, 0.75):
        upper = x[:, 0] > np.quantile(x[:, 0], share)
        rows: Floats | None = None
        for _ in range(_ROUNDS):
            if min(upper.sum(), (~upper).sum()) < _MIN_SAMPLES // 2:
                rows = None
                break
            rows = np.vstack([_fit_one(x[~upper], y[~upper]), _fit_one(x[upper], y[upper])])
            split = x @ rows[1] > x @ rows[0]
            if (split == upper).all():
                break
            upper = split
        if rows is not None and _error(rows, x, y) < best_error:
            best, best_error = rows, _error(rows, x, y)
    return best


def _predict(rows: Floats, x: Floats) -> Floats:
    predicted: Floats = (x @ rows.T).max(axis=1)
    return predicted


def _error(rows: Floats, x: Floats, y: Floats) -> float:
    return float(np.mean(((y - _predict(rows, x)) / (y + np.median(y))) ** 2))


def _r2(rows: Floats, x: Floats, y: Floats) -> float:
    total = float(((y - y.mean()) ** 2).sum())
    return 1.0 - float(((y - _predict(rows, x)) ** 2).sum()) / total if total > 0 else 0.0
