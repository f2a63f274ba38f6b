"""Tracing on request, explicit spans, and the context in metadata."""

from __future__ import annotations

import threading
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from kvbaton.rpc import telemetry
from kvbaton.rpc.telemetry import (
    build_provider,
    context_with,
    extract_context,
    inject_metadata,
    record_span,
    setup_tracing,
    start_span,
    tracing_requested,
)

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_SDK_DISABLED": "True"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_SDK_DISABLED": "false"}, True),
        ({"OTEL_SERVICE_NAME": "x"}, False),
    ],
)
def test_tracing_is_on_request(environ: dict[str, str], expected: bool) -> None:
    assert tracing_requested(environ) is expected


def test_off_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[Any] = []
    monkeypatch.setattr(trace, "set_tracer_provider", installed.append)
    shut_down = setup_tracing("router", "r0", enabled=False)
    shut_down()
    shut_down()
    assert installed == []


def test_on_installs_one_provider_and_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[Any] = []
    monkeypatch.setattr(trace, "set_tracer_provider", installed.append)
    shut_down = setup_tracing("router", "r0", enabled=True)
    attributes = installed[0].resource.attributes
    assert attributes["service.name"] == "router"
    assert attributes["service.instance.id"] == "r0"
    shut_down()
    shut_down()
    assert len(installed) == 1


def test_ending_is_bounded_when_the_flush_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    release, ended = threading.Event(), threading.Event()

    class Stuck:
        def shutdown(self) -> None:
            release.wait()
            ended.set()

    monkeypatch.setattr(telemetry, "build_provider", lambda *names: Stuck())
    monkeypatch.setattr(trace, "set_tracer_provider", lambda provider: None)
    monkeypatch.setattr(telemetry, "_SHUTDOWN_SECONDS", 0.01)
    setup_tracing("router", "r0", enabled=True)()
    assert not ended.is_set()
    release.set()
    assert ended.wait(10)


def test_the_operators_name_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "theirs")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    provider = build_provider("router", "r0")
    provider.shutdown()
    assert provider.resource.attributes["service.name"] == "theirs"
    assert provider.resource.attributes["deployment.environment.name"] == "test"
    assert provider.resource.attributes["service.instance.id"] == "r0"


def test_recorded_spans_have_the_given_times_and_parent(spans: Any) -> None:
    parent = start_span("parent", {"a": 1}, SpanKind.INTERNAL)
    record_span("child", 1_000, 2_000, {"b": 2}, context_with(parent))
    parent.end()
    child, ended = spans.ended
    assert (child.start_time, child.end_time) == (1_000, 2_000)
    assert child.parent.span_id == ended.context.span_id
    assert dict(child.attributes) == {"b": 2}


def test_start_span_makes_nothing_current(spans: Any) -> None:
    span = start_span("x")
    assert span.is_recording()
    assert not trace.get_current_span().is_recording()
    span.end()


def test_context_survives_the_metadata_and_replaces_an_older_one(spans: Any) -> None:
    span = start_span("x")
    old = (("traceparent", TRACEPARENT), ("mine", "1"), ("mine-bin", b"\0"))
    metadata = inject_metadata(old, context_with(span))
    assert isinstance(metadata, grpc.aio.Metadata)
    assert metadata.get_all("mine") == ["1"]
    assert metadata.get_all("mine-bin") == [b"\0"]
    assert len(metadata.get_all("traceparent")) == 1
    there = trace.get_current_span(extract_context(metadata)).get_span_context()
    assert there.trace_id == span.get_span_context().trace_id
    assert there.span_id == span.get_span_context().span_id
    span.end()


def test_without_a_trace_nothing_is_injected() -> None:
    assert list(inject_metadata(None)) == []
    assert list(inject_metadata([("a", "b")])) == [("a", "b")]


@pytest.mark.parametrize("metadata", [None, (), (("traceparent", "nonsense"),), (("traceparent", b"\0"),)])
def test_missing_or_malformed_context_is_none(metadata: Any) -> None:
    assert not trace.get_current_span(extract_context(metadata)).get_span_context().is_valid


def test_keys_are_read_in_any_case() -> None:
    context = trace.get_current_span(extract_context((("TraceParent", TRACEPARENT),))).get_span_context()
    assert format(context.span_id, "016x") == "b7ad6b7169203331"
