"""Spans of what an engine did, from a request's milestones."""

from collections.abc import Mapping

from opentelemetry.util.types import AttributeValue

from kvbaton.rpc.telemetry import record_span


def record_phase(
    name: str, start: float | None, stop: float | None, attributes: Mapping[str, AttributeValue] | None = None
) -> None:
    """Record the span of a phase between two milestones (Unix seconds); nothing if it never began or ended."""
    if start is not None and stop is not None:
        record_span(name, int(start * 1e9), int(stop * 1e9), attributes)


def seconds_between(start: float | None, stop: float | None) -> float:
    """Length of a phase; 0 if it never began or ended."""
    return 0.0 if start is None or stop is None else max(0.0, stop - start)
