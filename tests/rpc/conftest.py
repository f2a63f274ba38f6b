"""A log of ended spans, without a global tracer provider, and a service with one method of each RPC shape."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

from kvbaton.rpc.serving import Registration, channel, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from opentelemetry.trace import SpanKind

SERVICE = "kvbaton.test.Shapes"


class SpanLog(SpanProcessor):
    """Keeps ended spans, and wakes those who wait for one."""

    def __init__(self) -> None:
        self.ended: list[ReadableSpan] = []
        self._more = asyncio.Event()

    def on_end(self, span: ReadableSpan) -> None:
        self.ended.append(span)
        self._more.set()

    async def one(self, kind: SpanKind, name: str = "") -> ReadableSpan:
        """Wait for the first span of a kind and a name, which need not have ended yet."""
        async with asyncio.timeout(10):
            while True:
                self._more.clear()
                for span in self.ended:
                    if span.kind is kind and name in ("", span.name):
                        return span
                await self._more.wait()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[SpanLog]:
    provider, log = TracerProvider(shutdown_on_exit=False), SpanLog()
    provider.add_span_processor(log)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield log
    provider.shutdown()


def _shapes(**behaviours: Callable[..., Any]) -> Registration:
    """A service of raw bytes; the keyword of each behaviour is its RPC shape, and its method's name."""
    makers: dict[str, Callable[..., Any]] = {
        "unary_unary": grpc.unary_unary_rpc_method_handler,
        "unary_stream": grpc.unary_stream_rpc_method_handler,
        "stream_unary": grpc.stream_unary_rpc_method_handler,
        "stream_stream": grpc.stream_stream_rpc_method_handler,
    }
    handlers = {name: makers[name](behaviour) for name, behaviour in behaviours.items()}
    generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
    return Registration(SERVICE, lambda server: server.add_generic_rpc_handlers((generic,)))


@asynccontextmanager
async def _serve(**behaviours: Callable[..., Any]) -> AsyncIterator[grpc.aio.Channel]:
    async with (
        serving([_shapes(**behaviours)], "127.0.0.1", 0, grace_seconds=0) as server,
        channel(server.address) as opened,
    ):
        yield opened


@pytest.fixture
def served() -> Callable[..., AbstractAsyncContextManager[Any]]:
    """`async with served(unary_unary=…) as channel`: a traced channel to a server of `shapes`."""
    return _serve


@pytest.fixture
def shapes() -> Callable[..., Registration]:
    """`shapes(unary_unary=…)`: a service of raw bytes with one method of each shape that is given."""
    return _shapes
