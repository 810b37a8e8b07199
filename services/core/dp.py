"""The dynamic program: the most weight that fits, exactly, in the stated model of `services.core.fluid`.

Prefills are taken in deadline order (Lawler and Moore, Management Science 1969). After each, a label stands for a
subset by what matters to the future: how many were kept on each tier, the time the last prefill ends, the blocks it
holds, and the integer weight kept. Of two labels with equal counts, one is dropped if the other is not later, holds
not more and weighs not less: every continuation of the dropped one is then matched by the other, because `advance` is
monotone in time and blocks and the rate depends on counts alone. What is left per count is a short Pareto list.

A label is dropped as well if keeping all that is still to come would not beat a known answer: with the answer of
Moore-Hodgson as that bound, the program usually only proves that nothing better exists.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.core.columns import Floats, Ints
from services.core.compiled import compiled
from services.core.fluid import Flow, Fluid, advance, flow_at
from services.core.problem import EPS_S
from services.core.simulate import IN_TIME, LEFT_OUT

__all__ = ["MAX_LABELS", "Optimum", "optimum"]

MAX_LABELS = 1 << 15
"""Labels made at most, some 20 ms; beyond, the program gives up and the answer it was to beat stands."""

Bools = NDArray[np.bool_]


class Optimum(NamedTuple):
    """The heaviest feasible set: standing of every prefill, its weight (-1: none above the bound), labels made, and
    whether the search was complete."""

    standing: Ints
    weight: int
    labels: int
    exact: bool


class _Pool(NamedTuple):
    """All labels ever made, one column per field; `below` chains those of one layer with equal counts."""

    clock: Floats
    used: Ints
    weight: Ints
    cell: Ints
    parent: Ints
    took: Ints
    below: Ints
    alive: Bools


@compiled
def _new_pool() -> _Pool:
    return _Pool(
        np.empty(MAX_LABELS),
        np.empty(MAX_LABELS, np.int64),
        np.empty(MAX_LABELS, np.int64),
        np.empty(MAX_LABELS, np.int64),
        np.empty(MAX_LABELS, np.int64),
        np.empty(MAX_LABELS, np.int64),
        np.empty(MAX_LABELS, np.int64),
        np.empty(MAX_LABELS, np.bool_),
    )


@compiled
def _insert(
    pool: _Pool, size: int, head: Ints, cell: int, clock: float, used: int, weight: int, parent: int, took: int
) -> int:
    """Add a label to its cell unless another there is at least as good; remove those it beats. The new size."""
    i = head[cell]
    previous = -1
    while i >= 0:
        following = pool.below[i]
        if pool.clock[i] <= clock and pool.used[i] <= used and pool.weight[i] >= weight:
            return size
        if clock <= pool.clock[i] and used <= pool.used[i] and weight >= pool.weight[i]:
            pool.alive[i] = False
            if previous < 0:
                head[cell] = following
            else:
                pool.below[previous] = following
        else:
            previous = i
        i = following
    pool.clock[size] = clock
    pool.used[size] = used
    pool.weight[size] = weight
    pool.cell[size] = cell
    pool.parent[size] = parent
    pool.took[size] = took
    pool.below[size] = head[cell]
    pool.alive[size] = True
    head[cell] = size
    return size + 1


@compiled
def optimum(fluid: Fluid, promised: Ints, hopeful: Bools, bound: int) -> Optimum:
    """The heaviest set of hopeful prefills beside the promised ones, if it weighs more than `bound`.

    `promised` holds the standing of promised prefills: 1 must be in time, 2 is late already and only takes its time.
    """
    queue = fluid.problem.queue
    m = promised.shape[0]
    num_tiers = fluid.running.shape[0]
    width = np.ones(num_tiers + 1, np.int64)
    for c in range(num_tiers):
        width[c + 1] = width[c] * (1 + np.count_nonzero(hopeful & (queue.tier == c)))
    to_come = 0
    for j in range(m):
        if hopeful[j]:
            to_come += queue.weight[j]
    counts = fluid.running.copy()
    head = np.full(width[num_tiers], -1, np.int64)
    pool = _new_pool()
    size = _insert(pool, 0, head, 0, 0.0, 0, 0, -1, -1)
    layer_start = 0
    served_before = np.zeros(num_tiers, np.int64)
    exact = True
    for j in range(m):
        if promised[j] == LEFT_OUT and not hopeful[j]:
            continue
        layer_end = size
        for i in range(layer_start, layer_end):
            head[pool.cell[i]] = -1
        tier = queue.tier[j]
        asked = promised[j] == LEFT_OUT
        due = queue.deadline[j] - fluid.problem.start_s - fluid.problem.limits.margin_s
        if asked:
            to_come -= queue.weight[j]
        cell_before = -1
        flow = Flow(0.0, 0.0, 0, 0, 0)
        room_for_one_more = False
        for i in range(layer_start, layer_end):
            if not pool.alive[i]:
                continue
            if size + 2 > MAX_LABELS:
                exact = False
                break
            cell = pool.cell[i]
            if cell != cell_before:
                for c in range(num_tiers):
                    counts[c] = fluid.running[c] + served_before[c] + (cell // width[c]) % (width[c + 1] // width[c])
                flow = flow_at(fluid, counts)
                counts[tier] += 1
                room_for_one_more = counts.sum() <= fluid.problem.limits.seats and flow_at(fluid, counts).room >= 0
                cell_before = cell
            end, first = advance(fluid, flow, j, pool.clock[i], pool.used[i])
            fits = first <= due + EPS_S and room_for_one_more
            used = pool.used[i] + fluid.demand[j]
            if asked:
                if pool.weight[i] + to_come > bound:
                    size = _insert(pool, size, head, cell, pool.clock[i], pool.used[i], pool.weight[i], i, -1)
                if fits and pool.weight[i] + queue.weight[j] + to_come > bound:
                    weight = pool.weight[i] + queue.weight[j]
                    size = _insert(pool, size, head, cell + width[tier], end, used, weight, i, j)
            elif fits or promised[j] != IN_TIME:
                clock = end if end < np.inf else pool.clock[i]
                size = _insert(pool, size, head, cell, clock, used, pool.weight[i], i, -1)
        layer_start = layer_end
        if not asked:
            served_before[tier] += 1
        if not exact:
            break
    return _best(pool, layer_start, size, promised, bound, exact)


@compiled
def _best(pool: _Pool, start: int, size: int, promised: Ints, bound: int, exact: bool) -> Optimum:
    """The heaviest, then earliest label of the last layer, walked back to the set it stands for."""
    best = -1
    for i in range(start, size):
        if pool.alive[i] and pool.weight[i] > bound:
            better = best < 0 or pool.weight[i] > pool.weight[best]
            if better or (pool.weight[i] == pool.weight[best] and pool.clock[i] < pool.clock[best]):
                best = i
    standing = promised.copy()
    if best < 0 or not exact:
        return Optimum(standing, -1, size, exact)
    weight = pool.weight[best]
    while best >= 0:
        if pool.took[best] >= 0:
            standing[pool.took[best]] = IN_TIME
        best = pool.parent[best]
    return Optimum(standing, weight, size, exact)
