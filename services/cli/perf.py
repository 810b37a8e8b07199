"""`slosctl perf`: the performance model of each replica, as fitted, and the batches it was fitted to."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from protos import router_pb2, worker_pb2, worker_pb2_grpc
from services.cli.asynchronous import CommandError, run_async
from services.cli.perf_fit import fit_view
from services.cli.perf_plot import save_picture, text_plot
from services.cli.replicas import list_replicas
from services.cli.target import DataDirOption, RouterOption, find_target
from services.common.rpc import open_channel
from services.common.wire import perf_model_from_wire
from services.core.perf_model import BatchShape, attended

__all__ = ["perf", "perf_view"]

_RPC_TIMEOUT_S = 5.0
_BATCHES = (1, 64, 256, 512, 1024, 2048)


def perf_view(replica: router_pb2.Replica) -> Group:
    """Coefficients, quality of the fit, and what they mean for some batch sizes."""
    wire = replica.perf_model
    title = Text.assemble((replica.replica_id, "bold"), f"  {replica.engine}, {Path(replica.model).name}")
    title.append(f"   R2 {wire.r2:.4f}" if wire.r2 else "   a published preset, corrected on line")
    title.append(f", safety margin {wire.margin_s * 1000:.2f} ms")
    if wire.attention:
        title.append(f"\na prompt token after p others costs 1 + p / {1 / wire.attention:.0f} tokens")
    segments = Table(box=None, header_style="dim")
    for header in ("segment", "us/token", "ns/context token", "us/request", "us/draft step", "base ms"):
        segments.add_column(header, justify="right")
    for index, segment in enumerate(wire.segments):
        segments.add_row(
            str(index),
            f"{segment.k_tok * 1e6:.2f}",
            f"{segment.k_ctx * 1e9:.1f}",
            f"{segment.k_req * 1e6:.1f}",
            f"{segment.k_step * 1e6:.1f}",
            f"{segment.b * 1e3:.3f}",
        )
    model = perf_model_from_wire(wire)
    predicted = "   ".join(
        f"{tokens}: {model.seconds(BatchShape(tokens, requests=1, attended=attended(0, tokens))) * 1000:.1f}"
        for tokens in _BATCHES
    )
    return Group(title, segments, Text(f"batch of n prefill tokens, ms   {predicted}", style="dim"))


async def ask_profile(replica: router_pb2.Replica) -> worker_pb2.ProfileResponse:
    """What the worker of a replica has measured."""
    async with open_channel(replica.address, traced=False) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        answer: worker_pb2.ProfileResponse = await stub.Profile(worker_pb2.ProfileRequest(), timeout=_RPC_TIMEOUT_S)
    return answer


@run_async
async def perf(
    replica_id: Annotated[str, typer.Argument(help="Default: every replica.")] = "",
    plot: Annotated[
        Path | None,
        typer.Option(help="Also write a picture (PNG, SVG or PDF, by suffix) of one replica's fit, or into a folder."),
    ] = None,
    data_dir: DataDirOption = Path(".slos"),
    router: RouterOption = "",
) -> None:
    """Show the performance model that promises are computed with: coefficients, R2, margin, and how well it fits.

    The plots compare predicted with observed batch times, of the profile measured at start; for an emulated engine, of
    the last batches in service.
    """
    found = await list_replicas(find_target(data_dir, router=router).router)
    chosen = [replica for replica in found if replica_id in ("", replica.replica_id)]
    if not chosen:
        raise CommandError(f"no live replica {replica_id!r}" if replica_id else "no live replica")
    if plot is not None and len(chosen) > 1 and not plot.is_dir():
        raise CommandError(f"{len(chosen)} replicas: name one of them, or an existing folder with --plot")
    console = Console(highlight=False)
    for replica in chosen:
        console.print(perf_view(replica))
        view = fit_view(await ask_profile(replica))
        console.print(text_plot(view, console.width))
        if plot is not None:
            path = plot / f"perf-{replica.replica_id}.png" if plot.is_dir() else plot
            save_picture(view, path)
            console.print(f"wrote {path}")
