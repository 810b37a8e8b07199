"""A client that has no proto files: everything it needs comes from server reflection."""

import asyncio

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from services.cli.stack import LocalStack

pytestmark = pytest.mark.asyncio(loop_scope="session")

METHODS = {
    "admission": ("Admission", {"Generate", "Converse", "Resume", "Cancel", "Quote", "Explain"}),
    "router": ("Router", {"Place", "Replace", "ListReplicas", "Quote", "Explain"}),
    "planner": ("Planner", {"Admit", "Commit", "Release", "Quote", "Explain", "Observe"}),
    "worker": ("Worker", {"Subscribe", "Attach", "Cancel", "Drain", "Status", "Profile"}),
}


def described(address: str, service: str) -> tuple[set[str], set[str]]:
    """Services a server lists, and the methods of one of them, by reflection alone."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        found = pool.FindServiceByName(f"slosserve.v1.{service}")
        return set(database.get_services()), {method.name for method in found.methods}


@pytest.mark.parametrize("role", METHODS)
async def test_every_service_describes_itself(emulated: LocalStack, role: str) -> None:
    service, methods = METHODS[role]
    services, found = await asyncio.to_thread(described, emulated.addresses.of(role)[0], service)
    assert services == {f"slosserve.v1.{service}", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert found == methods


def call_generate(address: str) -> list[dict[str, object]]:
    """Generate a few tokens with messages made from reflected descriptors."""
    with grpc.insecure_channel(address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("slosserve.v1.Admission").FindMethodByName("Generate")
        request = GetMessageClass(method.input_type)(application="coder", text="def add(a, b):")
        request.sampling.max_tokens = 3
        call = channel.unary_stream(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        return [{"kind": event.WhichOneof("event"), "event": event} for event in call(request, timeout=30)]


async def test_a_client_without_proto_files_can_generate(emulated: LocalStack) -> None:
    events = await asyncio.to_thread(call_generate, emulated.admission_address)
    kinds = [event["kind"] for event in events]
    assert (kinds[0], kinds[-1]) == ("verdict", "finished")
    assert sum(len(event["event"].tokens.ids) for event in events if event["kind"] == "tokens") == 3
