"""The collector takes what a real exporter sends, and stays small."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from kvbaton.cli import collector as module
from kvbaton.cli.collector import SpanCollector, collecting, new_trace
from kvbaton.rpc import telemetry

if TYPE_CHECKING:
    import pytest


def batch(trace_id: str, *names: str) -> trace_service_pb2.ExportTraceServiceRequest:
    request = trace_service_pb2.ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    for name in names:
        spans.add(trace_id=bytes.fromhex(trace_id), span_id=b"12345678", name=name)
    return request


async def send(target: SpanCollector, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
    async with grpc.aio.insecure_channel(target.endpoint.removeprefix("http://")) as opened:
        stub = trace_service_pb2_grpc.TraceServiceStub(opened)  # type: ignore[no-untyped-call]
        await stub.Export(request)


async def test_a_real_exporters_spans_arrive_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_id, (key, traceparent) = new_trace()
    async with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "prefill-of-the-operator")
        provider = telemetry.build_provider("prefill", "prefill-0")
        monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
        parent = telemetry.extract_context(((key, traceparent),))
        span = telemetry.start_span(
            telemetry.SPAN_GENERATE, {telemetry.ATTR_FINISH_REASONS: ["stop"]}, parent_context=parent
        )
        span.add_event(telemetry.EVENT_FIRST_TOKEN, timestamp=1_500)
        attributes: dict[str, str | bool | int | float] = {"i": 7, "f": 0.5, "b": True, "s": "grpc"}
        below = telemetry.context_with(span)
        telemetry.record_span(telemetry.SPAN_KV_TRANSFER, 1_000, 2_000, attributes, below)
        span.end()
        await asyncio.to_thread(provider.shutdown)
        wanted = {telemetry.SPAN_GENERATE, telemetry.SPAN_KV_TRANSFER}
        spans = {span.name: span for span in await collector.wait_for(trace_id, wanted, timeout=10)}
    transfer, generate = spans[telemetry.SPAN_KV_TRANSFER], spans[telemetry.SPAN_GENERATE]
    assert transfer.attributes == attributes
    assert (transfer.start_ns, transfer.end_ns) == (1_000, 2_000)
    assert transfer.parent_id == generate.span_id
    assert generate.parent_id == traceparent.split("-")[2]
    assert generate.service == "prefill-of-the-operator"
    assert generate.attributes == {telemetry.ATTR_FINISH_REASONS: ("stop",)}
    assert [(event.name, event.time_ns) for event in generate.events] == [("first_token", 1_500)]


async def test_waiting_ends_when_the_last_name_arrives() -> None:
    trace_id = "0" * 31 + "1"
    async with collecting() as collector, asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(collector.wait_for(trace_id, {"a", "b"}, timeout=10))
        await send(collector, batch("f" * 32, "a", "b"))
        await send(collector, batch(trace_id, "a"))
        await send(collector, batch(trace_id, "b"))
        assert [span.name for span in await waiting] == ["a", "b"]


async def test_the_timeout_returns_what_there_is() -> None:
    async with collecting() as collector:
        await send(collector, batch("a" * 32, "a"))
        assert [span.name for span in await collector.wait_for("a" * 32, {"a", "b"}, timeout=0.01)] == ["a"]
        assert await collector.wait_for("b" * 32, {"a"}, timeout=0) == ()


async def test_old_traces_and_too_many_spans_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TRACES", 2)
    monkeypatch.setattr(module, "MAX_SPANS", 3)
    async with collecting() as collector:
        for digit in "abc":
            await send(collector, batch(digit * 32, *"vwxyz"))
        assert collector.spans("a" * 32) == ()
        assert [span.name for span in collector.spans("b" * 32)] == ["v", "w", "x"]
        assert len(collector.spans("c" * 32)) == 3


def test_new_traces_are_valid_and_sampled() -> None:
    trace_id, entry = new_trace()
    context = trace.get_current_span(telemetry.extract_context((entry,))).get_span_context()
    assert format(context.trace_id, "032x") == trace_id
    assert context.trace_flags.sampled
    assert new_trace()[0] != trace_id
