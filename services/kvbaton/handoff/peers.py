"""Connections from a prefill worker to the decode workers it sends to."""

from collections import OrderedDict
from collections.abc import Callable

import grpc


class PeerChannels:
    """Channels by endpoint, kept open between transfers. For one event loop."""

    def __init__(self, open_channel: Callable[[str], grpc.aio.Channel], capacity: int = 256) -> None:
        """`capacity` bounds the connections; the one unused longest is closed first."""
        self._open_channel = open_channel
        self._capacity = capacity
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()

    async def get(self, endpoint: str) -> grpc.aio.Channel:
        """The channel to host:port; it connects when it is first used."""
        channel = self._channels.get(endpoint)
        if channel is None:
            channel = self._channels[endpoint] = self._open_channel(endpoint)
        self._channels.move_to_end(endpoint)
        if len(self._channels) > self._capacity:
            _, oldest = self._channels.popitem(last=False)
            await oldest.close()
        return channel

    async def close(self) -> None:
        """Close all of them."""
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close()
