"""Connections from a prefill worker to the decode workers it sends to."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from kvbaton.engine.errors import KvbatonError, OverloadedError, UnavailableError
from kvbaton.handoff.http2.client import Connection

CONNECT_TIMEOUT_SECONDS = 10.0


class PeerConnections:
    """Connections by endpoint, kept open between transfers. For one event loop."""

    def __init__(
        self, open_connection: Callable[[str, float], Awaitable[Connection]] = Connection.open, capacity: int = 256
    ) -> None:
        """`capacity` bounds the connections; of those without streams the one unused longest is closed first."""
        self._open_connection = open_connection
        self._capacity = capacity
        self._connections: OrderedDict[str, Connection] = OrderedDict()
        self._opening: dict[str, asyncio.Future[None]] = {}

    async def get(self, endpoint: str) -> Connection:
        """The connection to host:port; however many ask, it is opened once, and again after it was lost.

        Raises UnavailableError when nobody answers, and OverloadedError when too many others are in use.
        """
        while True:
            connection = self._connections.get(endpoint)
            if connection is not None and not connection.closed:
                self._connections.move_to_end(endpoint)
                return connection
            opening = self._opening.get(endpoint)
            if opening is None:
                await self._open(endpoint)
            else:
                await asyncio.shield(opening)

    async def close(self) -> None:
        """Close all of them."""
        while self._connections:
            _, connection = self._connections.popitem()
            await connection.close()

    async def _open(self, endpoint: str) -> None:
        opening: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._opening[endpoint] = opening
        try:
            await self._make_room()
            self._connections[endpoint] = await self._open_connection(endpoint, CONNECT_TIMEOUT_SECONDS)
        except OverloadedError as error:
            opening.set_exception(error)
            raise
        except KvbatonError as error:
            problem = UnavailableError(f"decode worker {error}")
            opening.set_exception(problem)
            raise problem from error
        finally:
            del self._opening[endpoint]
            # Whoever waits looks again: after a cancel it opens the connection itself.
            if not opening.done():
                opening.set_result(None)
            opening.exception()

    async def _make_room(self) -> None:
        for endpoint in [endpoint for endpoint, connection in self._connections.items() if connection.closed]:
            del self._connections[endpoint]
        if len(self._connections) < self._capacity:
            return
        for endpoint, connection in self._connections.items():
            if connection.num_streams == 0:
                del self._connections[endpoint]
                await connection.close()
                return
        raise OverloadedError(f"{len(self._connections)} connections to decode workers are in use")
