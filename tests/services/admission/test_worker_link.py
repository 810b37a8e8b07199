"""The stream of tokens from one worker."""

from protos import worker_pb2
from services.admission.worker_link import WorkerLink
from services.common.clock import Clock
from tests.services.admission.world import World, soon


async def test_the_chunks_of_a_large_step_are_handed_on_in_order_and_in_parts(world: World) -> None:
    parts: list[list[str]] = []
    [replica] = world.admission.replicas.values()
    for number in range(70):
        world.worker.channel("another").put_nowait(worker_pb2.TokenChunk(request_id=f"r{number}", attempt=1))
    link = WorkerLink(
        replica,
        "another",
        Clock(),
        on_chunks=lambda _, chunks: parts.append([chunk.request_id for chunk in chunks]),
        on_linked=lambda: None,
        on_broken=lambda: None,
        on_skew=lambda _: None,
    )
    await soon(lambda: sum(map(len, parts)) == 70)
    await link.close()
    assert [len(part) for part in parts] == [32, 32, 6]
    assert [request_id for part in parts for request_id in part] == [f"r{number}" for number in range(70)]
