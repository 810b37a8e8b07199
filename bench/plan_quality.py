"""How much of the best possible each policy keeps, on replicas small enough to try every subset.

Part of `python -m bench plan`. The best is found by brute force over the same feasibility test that the policies use,
under one duration cap; "exceptions" counts the replicas where greedy keeps more than Moore-Hodgson alone.
"""

import itertools
import random
from dataclasses import dataclass

import numpy as np

from services.core.columns import columns_of
from services.core.dp_solver import solve_exactly
from services.core.feasibility import check, settle
from services.core.fluid import fluid_of
from services.core.presets import PRESETS, Preset
from services.core.problem import Problem, problem_of
from services.core.selection import Selection, fill_in, moore_hodgson, screen
from services.core.simulate import FEASIBLE
from services.core.solver import MH, solve
from services.core.speculation import MAX_VERIFY_TOKENS
from services.core.view import Decoder, PlanSettings, Prefill, ReplicaView

__all__ = ["Quality", "measure_quality"]

_CAP_S = 0.1
_TPOTS_S = (0.050, 0.100, 0.075)


@dataclass(frozen=True, slots=True)
class Quality:
    """Shares of the best total weight, and of replicas where the best was reached, over `instances` replicas."""

    weights: str
    instances: int
    conflicts: int
    kept: dict[str, float]
    optimal: dict[str, float]
    greedy_beats_plain_mh: int


def measure_quality(instances: int, seed: int, *, weighted: bool) -> Quality:
    """Compare greedy, plain Moore-Hodgson (without filling in), mh and dp with brute force."""
    rng = random.Random(seed)
    totals: dict[str, int] = dict.fromkeys(("greedy", "plain mh", "mh", "dp", "best"), 0)
    optimal = dict.fromkeys(totals, 0)
    counted = conflicts = exceptions = 0
    while counted < instances:
        problem, order = _instance(rng, weighted)
        found = _kept(problem, order)
        if found is None:
            continue
        counted += 1
        hopeful = int(found.pop("hopeful"))
        conflicts += found["best"] < hopeful
        exceptions += found["greedy"] > found["plain mh"]
        for name, weight in found.items():
            totals[name] += weight
            optimal[name] += weight >= found["best"]
    return Quality(
        "1, 2 and 5" if weighted else "all 1",
        instances,
        conflicts,
        {name: total / totals["best"] for name, total in totals.items()},
        {name: count / instances for name, count in optimal.items()},
        exceptions,
    )


def _kept(problem: Problem, order: np.ndarray) -> dict[str, int] | None:
    """Weight kept by each policy and by brute force; None where what is promised misses by itself."""
    queue = problem.queue
    standing, late_by_s = queue.promised.astype(np.int64), np.full(len(queue.tier), np.inf)
    if not settle(problem, standing, _CAP_S, late_by_s):
        return None
    hopeful, causes = screen(problem, ~queue.promised, 0.0)
    fluid = fluid_of(problem, _CAP_S, np.zeros(0), 1)
    caps_s = np.array([_CAP_S])
    found = {
        "hopeful": int(queue.weight[hopeful].sum()),
        "greedy": int(fill_in(fluid, False, Selection(standing, causes, 0, False), hopeful, late_by_s, order).weight),
        "plain mh": int(moore_hodgson(fluid, False, standing, hopeful, causes, late_by_s, 0).weight),
        "mh": int(solve(problem, MH, caps_s, order, 0.0).weight),
        "dp": int(solve_exactly(problem, caps_s, order, 0.0, np.zeros(0), MAX_VERIFY_TOKENS).weight),
        "best": 0,
    }
    rows = np.nonzero(hopeful)[0]
    for choice in itertools.product((False, True), repeat=len(rows)):
        chosen = rows[np.array(choice, np.bool_)]
        weight = int(queue.weight[chosen].sum())
        if weight > found["best"]:
            trial = standing.copy()
            trial[chosen] = 1
            if check(fluid, False, trial, late_by_s).code == FEASIBLE:
                found["best"] = weight
    return found


def _instance(rng: random.Random, weighted: bool) -> tuple[Problem, np.ndarray]:
    chosen: Preset = rng.choice(PRESETS)
    tiers = rng.randint(1, 3)
    decoders = []
    for index in range(rng.choice((0, 5, 30, 100))):
        tier = rng.randrange(tiers)
        due_s = rng.uniform(0.06, 0.3)
        decoders.append(Decoder(f"d{index}", tier, due_s, _TPOTS_S[tier], rng.randint(50, 900), rng.randint(1, 300)))
    prefills = []
    for index in range(rng.randint(3, 9)):
        tier = rng.randrange(tiers)
        prompt = min(6000, int(rng.lognormvariate(6.3, 1.0)) + 8)
        ttft_s = max(0.1, rng.choice((3, 5)) * chosen.model.zero_load_prefill_s(prompt)) * rng.uniform(0.5, 1.0)
        weight = rng.choice((1, 1, 2, 5)) if weighted else 1
        promised = index == 0 and rng.random() < 0.5
        output = rng.randint(1, 200)
        prefills.append(Prefill(f"p{index}", tier, ttft_s, _TPOTS_S[tier], prompt, 0, output, promised, weight=weight))
    items = sorted(prefills, key=lambda p: p.deadline_s)
    order = np.array([items.index(p) for p in prefills], np.int64)
    used = sum(-(-d.context_tokens // 16) for d in decoders)
    free = rng.choice((200, 600, 20_000))
    view = ReplicaView(0.0, chosen.model, decoders, (), free, used + free)
    return problem_of(view, columns_of(decoders), items, PlanSettings(caps_s=(_CAP_S,)), 0.0), order
