"""`slosctl replicas`: the fleet as the router sees it."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from protos import router_pb2, router_pb2_grpc
from services.cli.asynchronous import run_async
from services.cli.target import DataDirOption, RouterOption, find_target
from services.common.rpc import open_channel

__all__ = ["list_replicas", "replica_table", "replicas"]

_RPC_TIMEOUT_S = 5.0
_STYLES = {"READY": "green", "DRAINING": "yellow", "STARTING": "yellow"}


async def list_replicas(router: str) -> Sequence[router_pb2.Replica]:
    """Every replica with a live lease."""
    async with open_channel(router, traced=False) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        answer = await stub.ListReplicas(router_pb2.ListReplicasRequest(), timeout=_RPC_TIMEOUT_S)
    return answer.replicas


def _status(replica: router_pb2.Replica) -> str:
    name = router_pb2.ReplicaStatus.Name(replica.status).removeprefix("REPLICA_STATUS_")
    return f"[{_STYLES.get(name, 'red')}]{name.lower()}[/]"


def _model(name: str) -> str:
    return Path(name).name if name.startswith("/") else name


def _since(started_us: int) -> str:
    seconds = max(0.0, time.time() - started_us / 1e6)
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def replica_table(found: Sequence[router_pb2.Replica]) -> Table:
    """The replicas as a table."""
    table = Table(
        title="replicas", title_justify="left", title_style="bold", header_style="dim", box=None, padding=(0, 0, 0, 1)
    )
    for header in ("id", "status", "engine", "address"):
        table.add_column(header, no_wrap=True)
    for header in ("running", "waiting", "free KV", "R2", "up"):
        table.add_column(header, justify="right", no_wrap=True)
    for replica in found:
        table.add_row(
            replica.replica_id,
            _status(replica),
            f"{replica.engine} {_model(replica.model)}",
            replica.address,
            f"{replica.running}",
            f"{replica.waiting}",
            f"{replica.free_blocks}/{replica.total_blocks}",
            f"{replica.perf_model.r2:.3f}" if replica.perf_model.r2 else "preset",
            _since(replica.started_us),
        )
    return table


@run_async
async def replicas(data_dir: DataDirOption = Path(".slos"), router: RouterOption = "") -> None:
    """List the replicas: what they run, how full they are, how well their performance model fits."""
    target = find_target(data_dir, router=router)
    found = await list_replicas(target.router)
    Console().print(replica_table(found) if found else f"the router at {target.router} knows no live replica")
