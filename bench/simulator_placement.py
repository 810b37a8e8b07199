"""Which replica is asked first about a call, in the simulator: the router's own orders over the same load summaries."""

from collections.abc import Sequence

from bench.simulator_call import LiveCall
from bench.simulator_hook import SimulatedHook
from bench.simulator_replica import Replica
from services.core.perf_model import BatchShape
from services.core.placement import OrderName, PlacementRequest, ReplicaLoad, order_of, order_replicas

__all__ = ["SimulatedRouter"]


class SimulatedRouter:
    """Orders replicas as the router does; remembers where the calls of a session went."""

    def __init__(self, replicas: Sequence[Replica], order: OrderName) -> None:
        self._replicas = {f"r{index:03d}": replica for index, replica in enumerate(replicas)}
        self._ids = {id(replica): name for name, replica in self._replicas.items()}
        self._order = order_of(order)
        self._sessions: dict[int, str] = {}
        self._turn = 0

    def order(self, call: LiveCall, output_tokens: int) -> list[Replica]:
        """The replicas in the order to ask; all are asked where there is only one to choose from."""
        if len(self._replicas) == 1:
            return [*self._replicas.values()]
        self._turn += 1
        wanted = PlacementRequest(
            prompt_tokens=call.call.prompt_tokens,
            output_tokens=output_tokens,
            ttft_s=call.call.ttft_s,
            session_replica=self._sessions.get(call.job.number) if call.index else None,
        )
        loads = [_load(name, replica, call) for name, replica in self._replicas.items()]
        return [self._replicas[name] for name in order_replicas(wanted, loads, self._order, self._turn)]

    def placed(self, call: LiveCall, replica: Replica) -> None:
        """A call went to a replica."""
        if len(call.job.calls) > 1:
            self._sessions[call.job.number] = self._ids[id(replica)]


def _load(name: str, replica: Replica, call: LiveCall) -> ReplicaLoad:
    shape, model, scheduler = replica.shape, replica.shape.preset.model, replica.scheduler
    assert isinstance(scheduler, SimulatedHook)
    queued = scheduler.queued_prefill_tokens()
    return ReplicaLoad(
        id=name,
        running=len(scheduler.running),
        max_num_seqs=shape.preset.max_num_seqs,
        used_blocks=shape.blocks - scheduler.free_blocks_after_waiting(),
        total_blocks=shape.blocks,
        block_size=shape.preset.block_size,
        queued_prefill_s=model.seconds(BatchShape(queued)) if queued else 0.0,
        prefill_s=model.seconds(BatchShape(call.call.prompt_tokens)),
    )
