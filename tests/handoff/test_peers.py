"""Connections to decode workers: one each, opened once however many ask; none with streams on it is closed."""

import asyncio
from typing import Any

import pytest

from kvbaton.engine.errors import OverloadedError, UnavailableError
from kvbaton.handoff.peers import PeerConnections


class FakeConnection:
    def __init__(self, endpoint: str) -> None:
        self.endpoint, self.closed, self.num_streams = endpoint, False, 0

    async def close(self) -> None:
        self.closed = True


class Network:
    """Where everybody answers, in time."""

    def __init__(self) -> None:
        self.opened: list[FakeConnection] = []
        self.answering = asyncio.Event()
        self.answering.set()
        self.problem: Exception | None = None

    async def open(self, endpoint: str, timeout: float) -> Any:
        await self.answering.wait()
        if self.problem is not None:
            raise self.problem
        self.opened.append(FakeConnection(endpoint))
        return self.opened[-1]

    @property
    def states(self) -> list[tuple[str, bool]]:
        return [(connection.endpoint, connection.closed) for connection in self.opened]


async def test_peers_keep_the_connections_used_last() -> None:
    network = Network()
    peers = PeerConnections(network.open, capacity=2)
    first = await peers.get("a:1")
    await peers.get("b:1")
    assert await peers.get("a:1") is first
    await peers.get("c:1")
    assert network.states == [("a:1", False), ("b:1", True), ("c:1", False)]
    await peers.close()
    assert all(closed for _, closed in network.states)


async def test_one_with_streams_is_never_closed_for_another() -> None:
    network = Network()
    peers = PeerConnections(network.open, capacity=2)
    await peers.get("a:1")
    await peers.get("b:1")
    network.opened[0].num_streams = 1
    await peers.get("c:1")
    assert network.states == [("a:1", False), ("b:1", True), ("c:1", False)]
    network.opened[2].num_streams = 1
    with pytest.raises(OverloadedError, match="2 connections"):
        await peers.get("d:1")


async def test_a_lost_one_is_opened_again() -> None:
    network = Network()
    peers = PeerConnections(network.open, capacity=1)
    first: Any = await peers.get("a:1")
    first.closed = True
    again: Any = await peers.get("a:1")
    assert again is network.opened[1]
    network.opened[1].closed = True
    await peers.get("b:1")
    assert len(network.opened) == 3


async def test_many_who_ask_at_once_share_one() -> None:
    network = Network()
    network.answering.clear()
    peers = PeerConnections(network.open)
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(peers.get("a:1")) for _ in range(5)]
        await asyncio.sleep(0)
        # The first to ask goes away, and the others do not.
        asking[0].cancel()
        await asyncio.sleep(0)
        network.answering.set()
    found: list[Any] = [task.result() for task in asking[1:]]
    assert found == network.opened * 4
    assert len(network.opened) == 1


async def test_many_who_ask_at_once_hear_of_the_same_failure() -> None:
    network = Network()
    network.answering.clear()
    network.problem = UnavailableError("a:1 cannot be reached: refused")
    peers = PeerConnections(network.open)

    async def ask() -> None:
        with pytest.raises(UnavailableError, match="decode worker a:1 cannot be reached"):
            await peers.get("a:1")

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(ask())
        await asyncio.sleep(0)
        network.answering.set()
    network.problem = None
    await peers.get("a:1")
