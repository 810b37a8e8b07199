"""`python -m bench replay LOG`: decide recorded plans again, under the same policy or another.

Under the policy that was recorded the decisions must come out bit-identical; the exit status is 1 if one does not.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from services.core.admission import Policy, decide
from services.planner.recording import Recorded, decisions_to_json, run_from_json

__all__ = ["Replay", "main", "replay_log"]


@dataclass(slots=True)
class Replay:
    """What came out. `different` counts plans whose decisions are not bit-identical to the recorded ones."""

    plans: int = 0
    asked: int = 0
    recorded_admitted: int = 0
    replayed_admitted: int = 0
    different: int = 0
    same_policy_different: int = 0
    unreadable: int = 0


def replay_log(path: Path, policy: Policy | None = None) -> Replay:
    """Decide every plan of the log again; `policy` None keeps the recorded one of each."""
    found = Replay()
    for recorded in _plans(path, found):
        used = policy or recorded.policy
        decisions = decide(recorded.view, recorded.candidates, used, recorded.settings)
        replayed = decisions_to_json(decisions)
        same = replayed == recorded.decisions
        found.plans += 1
        found.asked += len(recorded.decisions["decisions"])
        found.recorded_admitted += sum(item["admitted"] for item in recorded.decisions["decisions"])
        found.replayed_admitted += len(decisions.admitted_ids)
        found.different += not same
        found.same_policy_different += not same and used is recorded.policy
    return found


def _plans(path: Path, found: Replay) -> Iterator[Recorded]:
    """Plans of the log in the order they were made, those of its older half first."""
    for part in (path.with_name(path.name + ".1"), path):
        if not part.exists():
            continue
        with part.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    yield run_from_json(json.loads(line))
                except (KeyError, TypeError, ValueError):
                    found.unreadable += 1


def main(
    log: Annotated[Path, typer.Argument(help="a decision log (SLOS_DECISION_LOG of a planner)", exists=True)],
    policy: Annotated[Policy | None, typer.Option(help="decide under this policy instead of the recorded one")] = None,
) -> None:
    """Decide recorded plans again and compare."""
    found = replay_log(log, policy)
    table = Table("", "recorded", "replayed" if policy is None else policy.value)
    table.add_row("plans", str(found.plans), str(found.plans))
    table.add_row("candidates", str(found.asked), str(found.asked))
    table.add_row("promised", str(found.recorded_admitted), str(found.replayed_admitted))
    console = Console()
    console.print(table)
    console.print(f"{found.plans - found.different} of {found.plans} plans bit-identical")
    if found.unreadable:
        console.print(f"{found.unreadable} lines could not be read")
    if found.same_policy_different or not found.plans:
        raise typer.Exit(1)
