"""The two systems of a live benchmark, started side by side: the full stack, and plain vLLM with the same engine."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from bench.bare_engine import BareEngine
from bench.live_targets import BareTarget, ServicesTarget
from bench.scenario import ScenarioFile
from protos import router_pb2, router_pb2_grpc, worker_pb2, worker_pb2_grpc
from services.cli.stack import LocalStack
from services.cli.stack_spec import StackSpec
from services.common.rpc import open_channel
from services.common.wire import perf_model_from_wire
from services.core.presets import Preset
from services.worker.engine_settings import EngineSettings

__all__ = ["Side", "engine_environment", "measured_batches", "sides", "write_catalogue"]

_VOCAB_SIZE = 4096
_NEVER = "(stages end by their recorded lengths)"  # no token of any vocabulary


@dataclass(frozen=True, slots=True)
class Side:
    """Both systems, ready. `measured` is the engine as the worker found it: its fitted model and its memory."""

    bare: BareTarget
    services: ServicesTarget
    stack: LocalStack
    measured: Preset
    r2_heldout: float


@asynccontextmanager
async def sides(
    engine: EngineSettings, file: ScenarioFile, data_dir: Path, *, planner: bool = True
) -> AsyncIterator[Side]:
    """Start plain vLLM and the stack with the same engine settings. Without a planner everything is best effort."""
    async with AsyncExitStack() as exits:
        catalogue = write_catalogue(file, data_dir / "catalogue.yaml")
        spec = StackSpec(
            data_dir=data_dir,
            engine=engine.engine,
            model=engine.model,
            preset=engine.preset,
            catalogue=catalogue,
            start_timeout_s=900.0,
            service_environment={"worker": engine_environment(engine)},
        )
        # The stack first: its worker profiles itself, for which it should be alone.
        stack = await exits.enter_async_context(LocalStack(spec))
        measured, r2_heldout = await _measured(stack, engine)
        same = engine if engine.gpu_memory_share is None else replace(engine, kv_blocks=measured.kv_blocks)
        bare = await exits.enter_async_context(BareEngine(same, _VOCAB_SIZE))
        channel = await exits.enter_async_context(open_channel(stack.admission_address, traced=False))
        if not planner:
            await stack.kill("planner-0")
        yield Side(BareTarget(bare), ServicesTarget(channel), stack, measured, r2_heldout)


async def measured_batches(stack: LocalStack) -> worker_pb2.ProfileResponse:
    """The batches that the worker's performance model was fitted to."""
    async with open_channel(stack.addresses.worker[0], traced=False) as channel:
        answer: worker_pb2.ProfileResponse = await worker_pb2_grpc.WorkerStub(channel).Profile(
            worker_pb2.ProfileRequest()
        )
    return answer


def engine_environment(engine: EngineSettings) -> dict[str, str]:
    """The worker's variables for these settings; what is not set is left to it."""
    named = {
        "SLOS_KV_BLOCKS": engine.kv_blocks,
        "SLOS_BLOCK_SIZE": engine.block_size,
        "SLOS_MAX_NUM_SEQS": engine.max_num_seqs,
        "SLOS_MAX_MODEL_LEN": engine.max_model_len,
        "SLOS_MAX_BATCH_TOKENS": engine.max_batch_tokens,
        "SLOS_CPU_THREADS": engine.cpu_threads,
        "SLOS_GPU_MEMORY_SHARE": engine.gpu_memory_share,
    }
    asynchronous = {None: "auto", True: "on", False: "off"}[engine.async_scheduling]
    return {
        "SLOS_DTYPE": engine.dtype,
        "SLOS_WEIGHTS": engine.weights,
        "SLOS_ASYNC_SCHEDULING": asynchronous,
        "SLOS_PROFILE_S": f"{engine.profile_s:g}",
        "SLOS_ENGINE_ARGS": json.dumps(dict(engine.extra)),
        **{name: str(value) for name, value in named.items() if value is not None},
    }


def write_catalogue(file: ScenarioFile, path: Path) -> Path:
    """The scenario file's tiers and applications as a catalogue for the services."""
    applications = {
        name: {
            "stages": [
                {
                    "kind": stage.kind.value,
                    "tpot_ms": stage.tpot_ms,
                    "ttft_slowdown": app.ttft_slowdown,
                    "end_token": _NEVER,
                }
                for stage in app.stages[:1]  # every call brings its own; this one names the application
            ]
        }
        for name, app in file.applications.items()
    }
    catalogue = {
        "tiers": dict(file.tiers),
        "ttft_floor_ms": file.ttft_floor_ms,
        "applications": applications,
        "tenants": {"default": {}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(catalogue, sort_keys=False), encoding="utf-8")
    return path


async def _measured(stack: LocalStack, engine: EngineSettings) -> tuple[Preset, float]:
    async with open_channel(stack.router_address, traced=False) as channel:
        listed = await router_pb2_grpc.RouterStub(channel).ListReplicas(router_pb2.ListReplicasRequest())
    replica = listed.replicas[0]
    async with open_channel(stack.addresses.worker[0], traced=False) as channel:
        status = await worker_pb2_grpc.WorkerStub(channel).Status(worker_pb2.StatusRequest())
    name = engine.preset if engine.engine == "emulated" else Path(engine.model).name
    model = perf_model_from_wire(replica.perf_model)
    shape = Preset(name, model, replica.total_blocks, replica.block_size, replica.max_num_seqs, replica.max_model_len)
    return shape, status.r2_heldout
