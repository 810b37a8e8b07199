"""slosctl: look at a running system and talk to it."""

import typer

from services.cli.dead import dead
from services.cli.explain import explain
from services.cli.perf import perf
from services.cli.queues import queues
from services.cli.quote import quote
from services.cli.replicas import replicas
from services.cli.submit import submit
from services.cli.trace import trace

app = typer.Typer(
    name="slosctl",
    help="Look at a running SLOs-Serve and talk to it. Without addresses, the local stack of --data-dir is meant.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (submit, quote, explain, queues, replicas, trace, perf):
    app.command()(command)
app.add_typer(dead, name="dead")

if __name__ == "__main__":
    app(prog_name="slosctl")
