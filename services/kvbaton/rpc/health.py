"""grpc.health.v1, whose watches end when the server drains and do not hold it for its grace period."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The health of a server ("") and of each service, for `Check` and `Watch`.

    The library's servicer serves a watch until its client goes, so that one idle watcher would make every
    shutdown as long as its grace period; therefore this small one.
    """

    name: Final[str] = health.SERVICE_NAME

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Condition()
        self._closed = False

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    async def set_serving(self, service: str, serving: bool) -> None:
        """Set one service's health. After `close` it stays NOT_SERVING."""
        async with self._changed:
            self._statuses[service] = _SERVING if serving and not self._closed else _NOT_SERVING
            self._changed.notify_all()

    async def close(self) -> None:
        """Say NOT_SERVING for everything, for good, and end the watches once they have said so."""
        async with self._changed:
            self._closed = True
            self._statuses = dict.fromkeys(self._statuses, _NOT_SERVING)
            self._changed.notify_all()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """Answer with a service's health; NOT_FOUND for one that is not served here."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Stream a service's health: at once, then at each change, until the server closes."""
        sent: int | None = None
        while True:
            async with self._changed:
                # Woken by every service's change, so most of the time there is nothing to say.
                while (status := self._status(request.service)) == sent and not self._closed:
                    await self._changed.wait()
                closed = self._closed
            if status != sent:
                # Outside the lock: a watcher that does not read must hold up nobody.
                await context.write(health_pb2.HealthCheckResponse(status=status))
                sent = status
            if closed:
                return

    def _status(self, service: str) -> int:
        status: int = self._statuses.get(service, _SERVICE_UNKNOWN)
        return status
