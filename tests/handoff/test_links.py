"""A sender's table of links: made once, kept while they are used, forgotten when they end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvbaton.engine.errors import OverloadedError, UnavailableError
from kvbaton.handoff import agreement as agreement_module
from kvbaton.handoff.choice import GRPC, SHARED_MEMORY
from kvbaton.handoff.links import LinkTable
from support.fakes import PATIENCE
from support.links import FakeOpener, FakeSharedPool, Memory, Network, book, offer


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement_module, "GRPC_PROBE_BYTES", 5000)


@contextlib.asynccontextmanager
async def running(network: Network, links_offer: Any = None, capacity: int = 256) -> AsyncIterator[LinkTable]:
    table = LinkTable(links_offer or offer(), network.connect, capacity)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        keeping = group.create_task(table.run())
        yield table
        keeping.cancel()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_link_is_made_once_however_many_ask_for_it() -> None:
    network = Network(d=book())
    network.gate.clear()

    async def use(table: LinkTable) -> int:
        async with table.using("d") as link:
            return id(link)

    async with running(network) as table, asyncio.TaskGroup() as group:
        uses = [group.create_task(use(table)) for _ in range(5)]
        await settle()
        network.gate.set()
    assert len({task.result() for task in uses}) == 1
    assert len(network.connections["d"]) == 1


async def test_it_is_told_of_once_and_in_the_status(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    memory = Memory()
    async with running(Network(d=book([FakeOpener(memory)])), offer([FakeSharedPool(memory)])) as table:
        told = await table.connect("d")
        assert (told.endpoint, told.transport, told.reason) == ("d", SHARED_MEMORY, "same host")
        assert await table.connect("d") == told
        assert table.report == (told,)
    assert [record.message for record in caplog.records] == ["KV to d goes by shared_memory (8.0 GB/s): same host"]


async def test_a_worse_transport_than_was_to_be_expected_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory()
    pool = FakeSharedPool(memory)
    pool.damage = True
    async with running(Network(d=book([FakeOpener(memory)])), offer([pool])) as table:
        assert (await table.connect("d")).transport == GRPC
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_who_goes_while_it_is_made_takes_it_from_nobody() -> None:
    network = Network(d=book())
    network.gate.clear()
    async with running(network) as table, asyncio.TaskGroup() as group:
        first, second = (group.create_task(table.connect("d")) for _ in range(2))
        await settle()
        first.cancel()
        network.gate.set()
        assert (await second).transport == GRPC


async def test_a_failure_reaches_all_who_wait_and_is_forgotten() -> None:
    network = Network()
    network.gate.clear()
    async with running(network) as table:

        async def fail() -> None:
            with pytest.raises(UnavailableError, match="connection refused"):
                await table.connect("d")

        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            group.create_task(fail())
            await settle()
            network.gate.set()
        network.receivers["d"] = book()
        assert (await table.connect("d")).transport == GRPC


async def test_where_no_transport_is_left_the_connection_is_closed() -> None:
    network = Network(d=book())
    async with running(network, offer([FakeSharedPool(Memory())], SHARED_MEMORY)) as table:
        with pytest.raises(UnavailableError, match="no link with decode worker d: --transport shared_memory"):
            await table.connect("d")
        assert network.connections["d"][0].closed
        assert table.report == ()


async def test_a_link_whose_stream_ends_is_forgotten_and_made_anew() -> None:
    network = Network(d=book())
    async with running(network) as table:
        await table.connect("d")
        network.receivers["d"] = book(incarnation="d-2")
        network.connections["d"][0].streams[0].end(UnavailableError("connection reset"))
        await settle()
        assert table.report == ()
        assert network.connections["d"][0].closed
        async with table.using("d") as link:
            assert link.agreement.incarnation == "d-2"


async def test_a_link_with_an_earlier_process_is_made_anew() -> None:
    network = Network(d=book())
    async with running(network) as table:
        await table.connect("d", "d-1")
        network.receivers["d"] = book(incarnation="d-2")
        await table.connect("d", "d-1")
        assert len(network.connections["d"]) == 1
        await table.connect("d", "d-2")
        assert len(network.connections["d"]) == 2
        # The router may be behind: it gets the link that there is.
        await table.connect("d", "d-1")
        assert len(network.connections["d"]) == 3


async def test_a_retired_link_stays_open_for_those_who_use_it() -> None:
    network = Network(d=book())
    async with running(network) as table:
        async with table.using("d") as link:
            await table.retire(link)
            connection = network.connections["d"][0]
            async with table.using("d") as another:
                assert another is not link
            assert not connection.closed
        assert connection.closed
        assert not network.connections["d"][1].closed


async def test_the_one_unused_longest_makes_room() -> None:
    network = Network(**{name: book() for name in "abcd"})
    async with running(network, capacity=2) as table:
        async with table.using("a"):
            await table.connect("b")
            await table.connect("c")
            await settle()
            assert [link.endpoint for link in table.report] == ["a", "c"]
            assert network.connections["b"][0].closed
            async with table.using("c"):
                with pytest.raises(OverloadedError, match="2 links are in use"):
                    await table.connect("d")
        await table.connect("d")
        await settle()
        assert [link.endpoint for link in table.report] == ["c", "d"]


async def test_in_the_end_every_connection_is_closed() -> None:
    network = Network(a=book(), b=book())
    async with running(network) as table:
        await table.connect("a")
        async with table.using("b") as link:
            await table.retire(link)
            await table.connect("b")
    connections = [connection for both in network.connections.values() for connection in both]
    assert len(connections) == 3
    assert all(connection.closed for connection in connections)


async def test_who_waits_for_a_link_when_the_worker_ends_hears_of_it() -> None:
    network = Network(d=book())
    network.gate.clear()
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        table = LinkTable(offer(), network.connect)
        keeping = group.create_task(table.run())

        async def ask() -> None:
            with pytest.raises(UnavailableError, match="the worker is ending"):
                await table.connect("d")

        group.create_task(ask())
        await settle()
        keeping.cancel()
