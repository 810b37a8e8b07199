"""`python -m bench NAME`: each command is a typed function `main` in `bench/NAME.py`, imported only when it is run."""

import importlib
import sys
from collections.abc import Sequence
from typing import Final

import typer

COMMANDS: Final = {
    "capacity": "the highest load each system carries, in virtual time around vLLM's scheduler",
    "bound": "the hindsight bound of every scenario, a linear program",
    "demo": "start everything, send recorded traffic, show promised against delivered",
    "flood": "ten times the load, slow readers and ten thousand streams on the real stack",
    "gpu": "profile a GPU, fit the model, serve the mixed scenario beside plain vLLM",
    "hook": "what the hook adds to a step of vLLM's scheduler",
    "live": "the full stack in real time beside plain vLLM, from recorded traffic",
    "overhead": "what the services add to a bare engine",
    "plan": "how long decisions and batch formation take",
    "report": "collect all results into docs/results.md",
    "scale": "capacity over the number of replicas, and the cost of placing",
    "replay": "decide recorded plans again, under the same policy or another",
    "soak": "random faults under load on the real stack: what was lost, repeated, run twice or left behind",
    "sweep": "attainment over load in virtual time, with a plot",
}


def run(arguments: Sequence[str]) -> int:
    """Run the named command; without a name list them all. Returns the exit status."""
    if not arguments or arguments[0] not in COMMANDS:
        asked_for_help = not arguments or arguments[0] in ("-h", "--help")
        stream = sys.stdout if asked_for_help else sys.stderr
        if not asked_for_help:
            print(f"no command {arguments[0]!r}", file=stream)
        print("python -m bench NAME [--help]\n", file=stream)
        for name, text in sorted(COMMANDS.items()):
            print(f"  {name:<10} {text}", file=stream)
        return 0 if asked_for_help else 2
    name, *rest = arguments
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(importlib.import_module(f"bench.{name}").main)
    app(rest, prog_name=f"python -m bench {name}")
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
