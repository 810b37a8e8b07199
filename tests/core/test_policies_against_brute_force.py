"""`dp` equals brute force, `mh` never beats it and `greedy` never beats `mh`, in the stated model; and over the
simulated plan what every policy keeps passes the feasibility test, in the same order of weight."""

from itertools import product

import numpy as np
from core_instances import Instance, instances
from hypothesis import HealthCheck, given, settings

from services.core.admission import Policy, decide
from services.core.columns import columns_of
from services.core.dp import optimum
from services.core.feasibility import check, settle
from services.core.fluid import Fluid, first_miss, fluid_of
from services.core.problem import Problem, problem_of
from services.core.selection import Selection, fill_in, moore_hodgson, screen
from services.core.simulate import FEASIBLE, LEFT_OUT

MANY = settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))


def problem_from(instance: Instance) -> Problem:
    items = sorted([*instance.view.prefills, *instance.candidates], key=lambda p: (p.deadline_s, p.id))
    return problem_of(instance.view, columns_of(instance.view.decoders), items, instance.settings, 0.0)


def stated_base(fluid: Fluid) -> np.ndarray:
    """Promised prefills, those that miss in the stated model marked late."""
    standing = fluid.problem.queue.promised.astype(np.int64)
    while (row := first_miss(fluid, standing)[0]) >= 0:
        standing[row] = 2
    return standing


def brute_force(weights: np.ndarray, hopeful: np.ndarray, fits) -> int:
    rows = np.nonzero(hopeful)[0]
    best = 0
    for choice in product((0, 1), repeat=len(rows)):
        weight = int(sum(w for w, c in zip(weights[rows], choice, strict=True) if c))
        if weight > best and fits(rows[np.array(choice, bool)] if len(rows) else rows):
            best = weight
    return best


def compare_in_stated_model(fluid: Fluid) -> None:
    queue = fluid.problem.queue
    base = stated_base(fluid)
    hopeful, causes = screen(fluid.problem, ~queue.promised, 0.0)
    late_by = np.full(len(base), np.inf)

    def fits(rows: np.ndarray) -> bool:
        standing = base.copy()
        standing[rows] = 1
        return first_miss(fluid, standing)[0] < 0

    best = brute_force(queue.weight, hopeful, fits)
    kept_by_mh = moore_hodgson(fluid, True, base, hopeful, causes, late_by, 0)
    kept_by_greedy = fill_in(fluid, True, Selection(base, causes, 0, False), hopeful, late_by, np.arange(len(base)))
    exact = optimum(fluid, base, hopeful, -1)
    assert exact.exact
    assert exact.weight == best
    assert fits(np.nonzero((exact.standing != LEFT_OUT) & (base == LEFT_OUT))[0])
    assert kept_by_mh.weight <= best
    assert kept_by_greedy.weight <= best
    bounded = optimum(fluid, base, hopeful, kept_by_mh.weight)
    assert max(bounded.weight, kept_by_mh.weight) == best


@MANY
@given(instances(late=False))
def test_dp_equals_brute_force_in_the_stated_model(instance: Instance) -> None:
    compare_in_stated_model(fluid_of(problem_from(instance), instance.settings.caps_s[0], np.zeros(0), 1))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(instances(late=False))
def test_dp_that_chooses_draft_lengths_equals_brute_force(instance: Instance) -> None:
    acceptance = np.array([0.6, 0.8, 0.3])
    compare_in_stated_model(fluid_of(problem_from(instance), instance.settings.caps_s[0], acceptance, 10))


@MANY
@given(instances())
def test_greedy_never_beats_mh_and_mh_never_beats_dp(instance: Instance) -> None:
    weight = {
        policy: decide(instance.view, instance.candidates, policy, instance.settings).kept_weight for policy in Policy
    }
    assert weight[Policy.GREEDY] <= weight[Policy.MH] <= weight[Policy.DP]


@settings(max_examples=800, deadline=None, suppress_health_check=list(HealthCheck))
@given(instances())
def test_no_policy_keeps_more_than_brute_force_over_the_simulated_plan(instance: Instance) -> None:
    problem = problem_from(instance)
    queue = problem.queue
    hopeful, _ = screen(problem, ~queue.promised, 0.0)
    best = 0
    fine_somewhere = False
    for cap_s in instance.settings.caps_s:
        base, late_by = queue.promised.astype(np.int64), np.full(len(queue.tier), np.inf)
        fine = settle(problem, base, cap_s, late_by)
        fluid = fluid_of(problem, cap_s, np.zeros(0), 1)

        def fits(rows: np.ndarray, base=base, late_by=late_by, fluid=fluid) -> bool:
            standing = base.copy()
            standing[rows] = 1
            return check(fluid, False, standing, late_by).code == FEASIBLE

        found = brute_force(queue.weight, hopeful, fits)
        best = found if fine and not fine_somewhere else max(best, found) if fine == fine_somewhere else best
        fine_somewhere = fine_somewhere or fine
    for policy in Policy:
        decisions = decide(instance.view, instance.candidates, policy, instance.settings)
        assert decisions.kept_weight <= best
        assert decisions.base_feasible == fine_somewhere
