"""Plans and ended promises as measurements."""

from services.common.instruments import PlannerInstruments
from services.planner.audit import Outcome
from services.planner.promises import PlanRun

__all__ = ["measure_outcome", "measure_run"]


def measure_run(instruments: PlannerInstruments, run: PlanRun) -> None:
    """One run of the core: its time, and the verdict on each candidate."""
    replica = {"slos_serve.replica": run.replica_id}
    instruments.plan_duration_s.record(run.seconds, {**replica, "slos_serve.policy": run.policy.value})
    instruments.running.set(len(run.view.decoders) + len(run.view.prefills), replica)
    applications = {candidate.id: candidate.application for candidate in run.candidates}
    for decision in run.decisions.decisions:
        instruments.plan_decisions.add(
            1,
            {
                **replica,
                "slos_serve.application": applications.get(decision.id, ""),
                "slos_serve.verdict": "admitted" if decision.admitted else "best_effort",
                "slos_serve.constraint": decision.constraint.kind.value,
            },
        )


def measure_outcome(instruments: PlannerInstruments, outcome: Outcome) -> None:
    """One promise that ended."""
    instruments.audited_promises.add(
        1,
        {
            "slos_serve.application": outcome.application,
            "slos_serve.kept": outcome.kept,
            "slos_serve.missed": outcome.missed,
            "slos_serve.cause": outcome.cause.value,
        },
    )
