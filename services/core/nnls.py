"""Non-negative least squares: Lawson and Hanson's active-set method (Solving Least Squares Problems, 1974, ch. 23)."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["solve_nnls"]

Floats = NDArray[np.float64]


def solve_nnls(a: Floats, y: Floats) -> Floats:
    """The x >= 0 that minimises |a x - y|. Columns are scaled to unit length first, so units do not matter."""
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0.0] = 1.0
    solution: Floats = _active_set(a / scale, y) / scale
    return solution


def _active_set(a: Floats, y: Floats) -> Floats:
    columns = a.shape[1]
    x = np.zeros(columns)
    free = np.zeros(columns, np.bool_)
    tolerance = 1e-10 * max(1e-300, float(np.abs(a.T @ y).max(initial=0.0)))
    for _ in range(3 * columns):
        gradient = a.T @ (y - a @ x)
        gradient[free] = -np.inf
        if free.all() or gradient.max() <= tolerance:
            break
        free[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(columns)
            trial[free] = np.linalg.lstsq(a[:, free], y, rcond=None)[0]
            blocking = free & (trial <= 0.0)
            if not blocking.any():
                x = trial
                break
            step = float((x[blocking] / (x[blocking] - trial[blocking])).min())
            x = x + step * (trial - x)
            free &= x > tolerance
            x[~free] = 0.0
    return x
