"""One trace per request, begun by the caller or here, and joined by what follows."""

from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from protos import types_pb2
from services.admission.tokens import ModelTokens
from services.client import Finished
from tests.services.admission.world import World, ids_of, soon


async def test_a_request_is_one_trace_under_its_caller(
    world: World, tokens: ModelTokens, spans: InMemorySpanExporter
) -> None:
    with trace.get_tracer("tests").start_as_current_span("caller") as caller:
        stream = world.client.generate("Go on.", application="chatbot")
        await anext(stream)
        queued = await world.placed()
        world.worker.emit(queued.request_id, ids_of(tokens, "traced"), finish=types_pb2.FINISH_REASON_STOP)
        finished = [event async for event in stream][-1]
    assert isinstance(finished, Finished)
    trace_id = caller.get_span_context().trace_id
    assert finished.trace_id == f"{trace_id:032x}"

    await soon(lambda: any(s.name == "request" and s.context.trace_id == trace_id for s in spans.get_finished_spans()))
    mine = {span.name: span for span in spans.get_finished_spans() if span.context.trace_id == trace_id}
    root = mine["request"]
    assert queued.traceparent.startswith(f"00-{trace_id:032x}-{root.context.span_id:016x}-")
    assert mine["admit"].parent.span_id == root.context.span_id
    assert mine["tokenise"].parent.span_id == mine["admit"].context.span_id
    assert mine["deliver"].parent.span_id == root.context.span_id
    placement = next(s for s in mine.values() if s.name.endswith("Router/Place") and s.kind is trace.SpanKind.CLIENT)
    assert placement.parent.span_id == mine["admit"].context.span_id
    assert root.attributes["slos_serve.verdict"] == "ADMITTED"
    assert root.attributes["slos_serve.met"] is finished.met
    assert root.attributes["gen_ai.usage.output_tokens"] == finished.output_tokens


async def test_a_refused_request_is_traced_with_its_error(world: World, spans: InMemorySpanExporter) -> None:
    with trace.get_tracer("tests").start_as_current_span("caller") as caller:
        call = world.client.generate("", application="chatbot")
        try:
            await anext(call)
        except Exception as error:
            assert "empty" in str(error)
    trace_id = caller.get_span_context().trace_id
    root = next(s for s in spans.get_finished_spans() if s.name == "request" and s.context.trace_id == trace_id)
    assert root.status.status_code is trace.StatusCode.ERROR
