"""Spans of what an engine did, from a request's milestones."""

from collections.abc import Mapping

from opentelemetry.util.types import AttributeValue

from kvbaton.engine.request import Request
from kvbaton.rpc import telemetry


def record_phase(
    name: str, start: float | None, stop: float | None, attributes: Mapping[str, AttributeValue] | None = None
) -> None:
    """Record the span of a phase between two milestones (Unix seconds); nothing if it never began or ended."""
    if start is not None and stop is not None:
        telemetry.record_span(name, int(start * 1e9), int(stop * 1e9), attributes)


def record_prefill(request: Request) -> None:
    """Record how long a request's prompt waited, and how long it was computed."""
    passed = request.milestones
    record_phase(telemetry.SPAN_PREFILL_QUEUE, passed.arrived, passed.prefill_started)
    computed = {telemetry.ATTR_PROMPT_TOKENS: request.num_prefill - request.num_cached}
    record_phase(telemetry.SPAN_PREFILL_COMPUTE, passed.prefill_started, passed.prefill_ended, computed)


def seconds_between(start: float | None, stop: float | None) -> float:
    """Length of a phase; 0 if it never began or ended."""
    return 0.0 if start is None or stop is None else max(0.0, stop - start)
