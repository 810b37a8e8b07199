"""What a stack is left with after faults: queue entries, KV blocks, tasks, runs that happened twice, memory."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import redis.asyncio

from bench.task_watch import TaskWatch
from protos import worker_pb2, worker_pb2_grpc
from services.cli.stack import LocalStack
from services.common.keys import DEAD_LETTERS, QUEUE_INDEX
from services.common.rpc import open_channel
from services.common.span_file import read_spans

__all__ = ["Leftovers", "Memory", "leftovers", "runs_twice"]

_WARM_S = 20.0  # what a process needs to load what it needs


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What should be zero once every request was answered. `tasks`: by process and kind, beyond the idle ones."""

    queue_entries: int
    pending_entries: int
    running: int
    kv_blocks: int
    dead_letters: int
    tasks: Mapping[str, int] = field(default_factory=dict)

    @property
    def none(self) -> bool:
        """Nothing is left. Dead letters are an answer, not a leftover."""
        return not (self.queue_entries or self.pending_entries or self.running or self.kv_blocks or self.tasks)


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of one process (without children), from warm to now; starts anew with another process."""

    name: str
    pid: int
    since_s: float
    first_mib: float
    last_mib: float
    seconds: float

    @classmethod
    def look(cls, name: str, pid: int, before: "Memory | None") -> "Memory":
        """The newest look at a process."""
        now_s = time.monotonic()
        try:
            mib = psutil.Process(pid).memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            return before or cls(name, pid, now_s, 0.0, 0.0, 0.0)
        if before is None or before.pid != pid:
            return cls(name, pid, now_s, mib, mib, 0.0)
        seconds = now_s - before.since_s
        first_mib = mib if seconds < _WARM_S else before.first_mib
        return replace(before, first_mib=first_mib, last_mib=mib, seconds=seconds)


async def leftovers(stack: LocalStack, tasks: TaskWatch | None = None) -> Leftovers:
    """Count what is left; tasks where somebody watches them."""
    client = redis.asyncio.from_url(stack.redis_url)
    entries = pending = 0
    try:
        for stream in await client.smembers(QUEUE_INDEX):
            entries += await client.xlen(stream)
            if await client.exists(stream):
                pending += sum(group["pending"] for group in await client.xinfo_groups(stream))
        dead = int(await client.xlen(DEAD_LETTERS))
    finally:
        await client.aclose()
    states = await asyncio.gather(*(_status(address) for address in stack.addresses.worker))
    running = sum(state.running + state.waiting for state in states)
    blocks = sum(state.total_blocks - state.free_blocks for state in states)
    return Leftovers(entries, pending, running, blocks, dead, {} if tasks is None else await tasks.surplus())


async def _status(address: str) -> worker_pb2.StatusResponse:
    async with open_channel(address, traced=False) as channel:
        return await worker_pb2_grpc.WorkerStub(channel).Status(worker_pb2.StatusRequest(), timeout=10)


def runs_twice(data_dir: Path) -> int:
    """Requests of which one attempt ran in two workers, or two attempts ran to their end.

    From the workers' spans; a worker that was killed wrote none of its last seconds.
    """
    begun: dict[tuple[str, int], set[str]] = defaultdict(set)
    ended: dict[str, set[int]] = defaultdict(set)
    for directory in {path.parent for path in data_dir.rglob("*.jsonl")}:
        for span in read_spans(directory):
            request_id, attempt = (
                span.attributes.get("slos_serve.request_id"),
                span.attributes.get("slos_serve.attempt"),
            )
            if request_id is None or attempt is None:
                continue
            if span.name == "prefill":
                begun[request_id, attempt].add(str(span.attributes.get("slos_serve.replica")))
            elif span.name.startswith("decode") and span.status != "ERROR":
                ended[request_id].add(attempt)
    twice = {request_id for (request_id, _), workers in begun.items() if len(workers) > 1}
    return len(twice | {request_id for request_id, attempts in ended.items() if len(attempts) > 1})
