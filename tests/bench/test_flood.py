"""What a flood's report counts: refusals by what ran out, second tries, and how every stream ended."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf import any_pb2

from bench.fault_load import Answer
from bench.flood import judge
from bench.flood_streams import open_streams
from protos import admission_pb2, admission_pb2_grpc, types_pb2
from services.common.errors import Reason, SloServeError
from services.common.rpc import RpcServer


def refused(name: str, delay_ms: float, kind: types_pb2.ConstraintKind.ValueType) -> Answer:
    packed = any_pb2.Any()
    packed.Pack(types_pb2.Verdict(constraint=types_pb2.Constraint(kind=kind)))
    answer = Answer(name, (20,), 4, 0.0, done=True)
    answer.error = SloServeError(Reason.NO_CAPACITY, "full", retry_after_ms=delay_ms, details=(packed,))
    return answer


def test_a_wave_says_why_requests_were_turned_away_and_what_they_were_told() -> None:
    hopeless, memory = types_pb2.CONSTRAINT_KIND_HOPELESS, types_pb2.CONSTRAINT_KIND_KV_BLOCKS
    first = [refused("a", 100, hopeless), refused("b", 900, hopeless), refused("c", 500, memory)]
    wave = judge("flood", first, [refused("a-again", 50, hopeless)])
    assert wave.shed_by == {"NO_CAPACITY HOPELESS": 2, "NO_CAPACITY KV_BLOCKS": 1}
    assert (wave.shed, wave.shed_with_delay, wave.counts["requests"]) == (3, 3, 3)
    assert (wave.delays_ms[1], wave.delays_ms[3]) == (500, 900)
    assert wave.came_back == {"came back": 1, "promised": 0, "kept": 0}
    assert wave.whole


class Door(admission_pb2_grpc.AdmissionServicer):
    """Ends call number n as `script[n]` says: an error, a bare status code, or to its end."""

    def __init__(self, *script: SloServeError | grpc.StatusCode | None) -> None:
        self._script = list(script)

    async def Generate(  # noqa: N802  (named by gRPC)
        self, request: admission_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[admission_pb2.GenerateEvent]:
        how = self._script.pop(0)
        if isinstance(how, SloServeError):
            raise how
        if how is not None:
            await context.abort(how, "no reason")
        yield admission_pb2.GenerateEvent(verdict=types_pb2.Verdict())
        yield admission_pb2.GenerateEvent(finished=admission_pb2.Finished())


async def test_streams_come_back_when_told_and_an_end_without_a_reason_is_counted() -> None:
    busy = SloServeError(Reason.NO_CAPACITY, "busy", retry_after_ms=1)
    impossible = SloServeError(Reason.SLO_IMPOSSIBLE, "never")
    server = RpcServer("127.0.0.1:0")
    door = Door(busy, None, grpc.StatusCode.CANCELLED, impossible, None)
    admission_pb2_grpc.add_AdmissionServicer_to_server(door, server.grpc)
    await server.start([])
    found = await open_streams(f"127.0.0.1:{server.port}", 4, 60.0)
    await server.stop(0)
    assert (found.refused, found.without_reason, found.clean) == (1, 1, False)
    assert sorted(found.ended.values()) == [1, 1, 2]
    assert (found.ended["finished"], found.ended["SLO_IMPOSSIBLE"]) == (2, 1)
    assert found.answered_s[2] > 0
