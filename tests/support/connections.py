"""Connections to receivers, without links."""

from kvbaton.engine.errors import UnavailableError
from kvbaton.handoff.http2.client import Connection
from support.fakes import PATIENCE


class PeerConnections:
    """One by endpoint, opened when it is first asked for, and again after it was lost."""

    def __init__(self) -> None:
        self._connections: dict[str, Connection] = {}

    async def get(self, endpoint: str) -> Connection:
        """The connection to host:port."""
        connection = self._connections.get(endpoint)
        if connection is None or connection.closed:
            try:
                connection = self._connections[endpoint] = await Connection.open(endpoint, PATIENCE)
            except UnavailableError as error:
                raise UnavailableError(f"decode worker {error}") from error
        return connection

    async def close(self) -> None:
        """Close all of them."""
        while self._connections:
            _, connection = self._connections.popitem()
            await connection.close()
