"""A small OTLP trace collector, so that a demo can show its own request's waterfall."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from kvbaton.cli.waterfall import AttributeValue, Event, Span

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.trace.v1 import trace_pb2

MAX_TRACES: Final = 64
MAX_SPANS: Final = 2_000


class SpanCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans of the newest traces: 64 traces, 2,000 spans each. Further spans are dropped.

    `collecting` makes one that listens.
    """

    def __init__(self) -> None:
        self._traces: OrderedDict[str, list[Span]] = OrderedDict()
        self._arrived = asyncio.Condition()
        self.endpoint = ""
        """What OTEL_EXPORTER_OTLP_ENDPOINT has to be for the processes that are observed."""

    async def Export(
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Take one batch, as an OTLP exporter sends it."""
        async with self._arrived:
            for trace_id, span in _spans(request):
                self._keep(trace_id, span)
            self._arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace_id_hex: str) -> tuple[Span, ...]:
        """Return what has arrived of a trace, in the order of arrival."""
        return tuple(self._traces.get(trace_id_hex, ()))

    async def wait_for(
        self,
        trace_id_hex: str,
        names: set[str],
        timeout: float,
    ) -> tuple[Span, ...]:
        """Wait until a trace has a span of each name, at most `timeout` seconds, and return what it has then.

        It does not fail at the timeout, because a waterfall with a gap is better than none.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout), self._arrived:
                await self._arrived.wait_for(lambda: names <= {span.name for span in self.spans(trace_id_hex)})
        return self.spans(trace_id_hex)

    def _keep(self, trace_id: str, span: Span) -> None:
        spans = self._traces.setdefault(trace_id, [])
        if len(spans) < MAX_SPANS:
            spans.append(span)
        while len(self._traces) > MAX_TRACES:
            self._traces.popitem(last=False)


@asynccontextmanager
async def collecting(host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[SpanCollector]:
    """Run a collector until the block ends; the default is any free port of the loopback.

    Raises RuntimeError if the address cannot be listened on.
    """
    collector = SpanCollector()
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    bound = server.add_insecure_port(f"{host}:{port}")
    collector.endpoint = f"http://{host}:{bound}"
    await server.start()
    try:
        yield collector
    finally:
        await server.stop(0)


def new_trace() -> tuple[str, tuple[str, str]]:
    """Return a fresh trace id in hexadecimal, and the metadata entry that puts a call into that trace,
    sampled.
    """
    trace_id = secrets.token_hex(16)
    return trace_id, ("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01")


def _spans(request: trace_service_pb2.ExportTraceServiceRequest) -> Iterable[tuple[str, Span]]:
    for resource_spans in request.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        service = str(resource.get("service.name", ""))
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield span.trace_id.hex(), _span(span, service)


def _span(span: trace_pb2.Span, service: str) -> Span:
    return Span(
        name=span.name,
        service=service,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        events=tuple(Event(event.name, event.time_unix_nano) for event in span.events),
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, AttributeValue]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> AttributeValue:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(str(_value(item)) for item in value.array_value.values)
    if kind == "string_value":
        return value.string_value
    if kind == "bool_value":
        return value.bool_value
    if kind == "int_value":
        return value.int_value
    if kind == "double_value":
        return value.double_value
    return ""
