"""`slosctl perf`: how batches compare with the model, in the terminal and as a picture."""

import asyncio
import io
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from protos import router_pb2, router_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc
from services.cli.asynchronous import CommandError
from services.cli.perf_fit import fit_view, r2_of
from services.cli.perf_plot import save_picture, text_plot
from services.cli.scatter import Point, scatter
from services.common.rpc import RpcServer

ROOT = Path(__file__).parents[3]
FITTED = types_pb2.PerfModel(segments=[types_pb2.PerfSegment(k_tok=1e-4, b=0.01)], margin_s=0.002, r2=0.97)
SLOWER = types_pb2.PerfModel(segments=[types_pb2.PerfSegment(k_tok=2e-4, b=0.02)], margin_s=0.002, r2=0.97)


def batch(tokens: int, ms: float, *, heldout: bool = False) -> worker_pb2.MeasuredBatch:
    return worker_pb2.MeasuredBatch(tokens=tokens, requests=1, seconds=ms / 1000, heldout=heldout)


def profile(**fields: Any) -> worker_pb2.ProfileResponse:
    return worker_pb2.ProfileResponse(**{"replica_id": "w0", "fitted": FITTED, "current": SLOWER, **fields})


def printed(renderable: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=90).print(renderable)
    return out.getvalue()


def test_points_land_where_their_values_are_and_strays_on_the_border() -> None:
    points = [Point(0, 0, "a"), Point(10, 10, "b"), Point(5, 5, "c"), Point(99, -99, "d")]
    assert scatter(points, width=5, height=3, x_range=(0, 10), y_range=(0, 10)) == ["    b", "  c  ", "a   d"]


def test_profiled_batches_are_judged_by_the_fit_and_recent_ones_by_the_model_in_force() -> None:
    view = fit_view(profile(profiled=[batch(100, 21), batch(200, 30, heldout=True)], recent=[batch(100, 41)]))
    assert [(round(b.predicted_ms, 6), round(b.residual_ms, 6), b.kind) for b in view.profiled] == [
        (20.0, 1.0, "fitted"),
        (30.0, 0.0, "heldout"),
    ]
    assert [(round(b.predicted_ms, 6), round(b.residual_ms, 6)) for b in view.recent] == [(40.0, 1.0)]
    assert view.batches == view.profiled
    assert r2_of(view.profiled) == pytest.approx(1 - 1 / (2 * 4.5**2))


def test_the_terminal_shows_both_kinds_and_the_size_of_the_residuals() -> None:
    batches = [batch(n, 10 + n / 10 + (5 if n == 400 else 0), heldout=n % 200 == 0) for n in range(100, 900, 50)]
    text = printed(text_plot(fit_view(profile(profiled=batches)), 90))
    assert "fitted: 12" in text
    assert "held out: 4" in text
    assert "predicted 95.0 ms" in text
    assert "+5.0" in text
    rows = [line for line in text.splitlines() if "│" in line or "┤" in line]
    assert len(rows) == 25
    assert sum(row.count("x") for row in rows) == 8  # each held-out batch in both plots


def test_a_replica_without_batches_says_so() -> None:
    view = fit_view(profile())
    assert "no batches measured yet" in printed(text_plot(view, 90))
    with pytest.raises(CommandError, match="w0 has measured no batches"):
        save_picture(view, Path("never-written.png"))


@pytest.mark.parametrize("name", ["fit.xyz", "no-such-folder/fit.png"])
def test_a_picture_that_cannot_be_written_is_refused_by_name(tmp_path: Path, name: str) -> None:
    view = fit_view(profile(recent=[batch(100, 41), batch(200, 63)]))
    with pytest.raises(CommandError, match="cannot write"):
        save_picture(view, tmp_path / name)


class Fleet(router_pb2_grpc.RouterServicer, worker_pb2_grpc.WorkerServicer):
    """A router that lists one replica, and that replica's worker."""

    def __init__(self) -> None:
        self.address = ""

    async def ListReplicas(self, request: Any, context: Any) -> router_pb2.ListReplicasResponse:  # noqa: N802
        replica = router_pb2.Replica(replica_id="w0", address=self.address, model="m", engine="vllm", perf_model=FITTED)
        return router_pb2.ListReplicasResponse(replicas=[replica])

    async def Profile(self, request: Any, context: Any) -> worker_pb2.ProfileResponse:  # noqa: N802
        return profile(profiled=[batch(100, 21), batch(200, 29, heldout=True)])


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet, server = Fleet(), RpcServer("127.0.0.1:0")
    router_pb2_grpc.add_RouterServicer_to_server(fleet, server.grpc)
    worker_pb2_grpc.add_WorkerServicer_to_server(fleet, server.grpc)
    await server.start([])
    fleet.address = f"127.0.0.1:{server.port}"
    yield fleet
    await server.stop(0)


async def test_the_command_shows_the_fit_and_writes_a_picture_per_replica(fleet: Fleet, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", "perf", "--router", fleet.address, "--plot", str(tmp_path)),
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, errors.decode()) == (0, "")
    assert "R2 0.9700" in out.decode()
    assert "held out: 1" in out.decode()
    assert (tmp_path / "perf-w0.png").read_bytes().startswith(b"\x89PNG")
