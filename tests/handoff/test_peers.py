"""Connections to decode workers: one each, the one unused longest is closed first."""

from typing import Any

from kvbaton.handoff.peers import PeerChannels


class FakeChannel:
    def __init__(self, endpoint: str) -> None:
        self.endpoint, self.closed = endpoint, False

    async def close(self) -> None:
        self.closed = True


async def test_peers_keep_the_channels_used_last() -> None:
    opened: list[FakeChannel] = []

    def open_channel(endpoint: str) -> Any:
        opened.append(FakeChannel(endpoint))
        return opened[-1]

    peers = PeerChannels(open_channel, capacity=2)
    first = await peers.get("a:1")
    await peers.get("b:1")
    assert await peers.get("a:1") is first
    await peers.get("c:1")
    assert [(channel.endpoint, channel.closed) for channel in opened] == [("a:1", False), ("b:1", True), ("c:1", False)]
    await peers.close()
    assert all(channel.closed for channel in opened)
