"""`slosctl explain`: why was a request deferred, rejected or late?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.answer_view import explanation_view
from services.cli.asynchronous import run_async
from services.cli.target import AdmissionOption, DataDirOption, KeyOption, find_target
from services.client import SlosClient

__all__ = ["explain"]

_TIMEOUT_S = 10.0


@run_async
async def explain(
    request_id: Annotated[str, typer.Argument(help="The request's id.")],
    data_dir: DataDirOption = Path(".slos"),
    admission: AdmissionOption = "",
    key: KeyOption = "",
) -> None:
    """Explain a request: its verdict with the constraint that decided it, what each replica said, what was late.

    Requests are remembered for ten minutes after their end, rejected ones for an hour.
    Exit status: 0 explained, 1 failed or not known.
    """
    target = find_target(data_dir, admission=admission)
    async with SlosClient(target.admission, key=key or None) as client:
        said = await client.explain(request_id, timeout_s=_TIMEOUT_S)
    Console(highlight=False).print(explanation_view(request_id, said))
