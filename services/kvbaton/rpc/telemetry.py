"""Names of spans and attributes, and the few calls through which kvbaton uses OpenTelemetry.

While no provider is installed every span is non-recording, and each call here costs a microsecond or so.
All state is OpenTelemetry's own: the global provider and the current context.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

import grpc
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

SPAN_GENERATE: Final = "kvbaton.generate"
"""The whole request, at the router; carries the gen_ai.* attributes and the two token events."""
SPAN_ROUTE: Final = "route"
SPAN_DECODE_ADMIT: Final = "decode.admit"
SPAN_PREFILL_QUEUE: Final = "prefill.queue"
SPAN_PREFILL_COMPUTE: Final = "prefill.compute"
SPAN_KV_TRANSFER: Final = "kv.transfer"
SPAN_DECODE_WAIT: Final = "decode.wait"
SPAN_DECODE_STREAM: Final = "decode.stream"

EVENT_FIRST_TOKEN: Final = "first_token"
"""Event on SPAN_GENERATE: the first token left for the client."""
EVENT_SECOND_TOKEN: Final = "second_token"

ATTR_TRANSFER_BYTES: Final = "kvbaton.transfer.bytes"
ATTR_TRANSFER_FRAMES: Final = "kvbaton.transfer.frames"
ATTR_TRANSFER_TRANSPORT: Final = "kvbaton.transfer.transport"
ATTR_TRANSFER_REASON: Final = "kvbaton.transfer.reason"
ATTR_TRANSFER_PROBED: Final = "kvbaton.transfer.probed_bytes_per_second"
ATTR_TRANSFER_OVERLAPPED_SHARE: Final = "kvbaton.transfer.overlapped_share"
"""The part of the transfer that fell inside the forward passes, 0 to 1."""
ATTR_PROMPT_TOKENS: Final = "kvbaton.prompt_tokens"
"""On prefill.compute: prompt tokens that were computed, cached ones left out."""
ATTR_COMPLETION_TOKENS: Final = "kvbaton.completion_tokens"
"""On decode.stream: tokens that the decode worker made, from the second on."""
ATTR_REQUEST_ID: Final = "kvbaton.request_id"

ATTR_OPERATION_NAME: Final = "gen_ai.operation.name"
ATTR_PROVIDER_NAME: Final = "gen_ai.provider.name"
PROVIDER_NAME: Final = "kvbaton"
ATTR_REQUEST_MODEL: Final = "gen_ai.request.model"
ATTR_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
ATTR_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
ATTR_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"

_INSTRUMENTATION: Final = "kvbaton"
_SHUTDOWN_SECONDS: Final = 2.0


def tracing_requested(environ: Mapping[str, str]) -> bool:
    """Say whether the OTEL_* variables ask for traces: they name an endpoint and do not disable the SDK."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return any(environ.get(name, "").strip() for name in names)


def build_provider(service_name: str, instance: str) -> TracerProvider:
    """Make a provider that exports by OTLP over gRPC, without installing it.

    The exporter and the sampler follow the OTEL_* variables; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    win over the arguments.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = Resource.create({"service.name": service_name, "service.instance.id": instance})
    resource = ours.merge(OTELResourceDetector().detect())
    # The SDK's own exit hook waits for an unreachable collector far longer than a rollout should.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def setup_tracing(service_name: str, instance: str, *, enabled: bool) -> Callable[[], None]:
    """Install the process's tracer provider if `enabled`, and return a function that flushes and ends it.

    The returned function blocks for at most two seconds, may be called again, and does nothing where tracing
    is off.
    """
    if not enabled:
        return _nothing
    provider = build_provider(service_name, instance)
    trace.set_tracer_provider(provider)

    def shut_down() -> None:
        # In a thread of its own, because the SDK bounds neither its flush nor the export in progress.
        thread = threading.Thread(target=provider.shutdown, name="tracing-shutdown", daemon=True)
        thread.start()
        thread.join(_SHUTDOWN_SECONDS)

    return shut_down


def start_span(
    name: str,
    attributes: Mapping[str, AttributeValue] | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    parent_context: Context | None = None,
) -> Span:
    """Start a span under `parent_context`, or the current one. The caller ends it; it is not made current."""
    return trace.get_tracer(_INSTRUMENTATION).start_span(name, context=parent_context, kind=kind, attributes=attributes)


def record_span(
    name: str,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, AttributeValue] | None = None,
    parent_context: Context | None = None,
) -> None:
    """Record a span that has already happened, as an engine thread measured it, in Unix nanoseconds."""
    span = trace.get_tracer(_INSTRUMENTATION).start_span(
        name, context=parent_context, attributes=attributes, start_time=start_ns
    )
    span.end(end_time=end_ns)


def current_context() -> Context:
    """Return the calling task's trace context, to hand to a thread or to another task."""
    return otel_context.get_current()


def context_with(span: Span, context: Context | None = None) -> Context:
    """Return `context`, or the current one, with `span` as the parent of what is started under it."""
    return trace.set_span_in_context(span, context)


def inject_metadata(
    metadata: Iterable[tuple[str, str | bytes]] | None = None, context: Context | None = None
) -> grpc.aio.Metadata:
    """Return a copy of `metadata` that carries the trace context, the current one unless given."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context)
    kept = (pair for pair in metadata or () if pair[0].lower() not in carrier)
    return grpc.aio.Metadata(*kept, *carrier.items())


def extract_context(metadata: Iterable[tuple[str, str | bytes]] | None) -> Context:
    """Read the trace context out of call metadata; without one it is the current context."""
    carrier: dict[str, list[str]] = {}
    for key, value in metadata or ():
        if isinstance(value, str):
            carrier.setdefault(key.lower(), []).append(value)
    return propagate.extract(carrier)


def _nothing() -> None:
    """End a tracing that was never set up."""
