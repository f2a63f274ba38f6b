"""Links over real connections: both halves, and what happens to either when the other goes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from kvbaton.engine.errors import UnavailableError
from kvbaton.handoff.agreement import LinkOffer
from kvbaton.handoff.choice import GRPC, SHARED_MEMORY
from kvbaton.handoff.http2.client import Connection
from kvbaton.handoff.http2.server import Server, serving_kv
from kvbaton.handoff.incoming_links import LinkBook
from kvbaton.handoff.link_call import LinkCall
from kvbaton.handoff.links import LINK_METHOD, LinkTable
from support.fakes import PATIENCE
from support.links import FakeOpener, FakeSharedPool, Memory, book, offer


@contextlib.asynccontextmanager
async def linking(links: LinkBook, offered: LinkOffer) -> AsyncIterator[tuple[LinkTable, Server]]:
    async with (
        asyncio.timeout(PATIENCE),
        serving_kv({LINK_METHOD: lambda stream: LinkCall(links, stream)}, "127.0.0.1", 0) as server,
        asyncio.TaskGroup() as group,
    ):
        table = LinkTable(offered, Connection.open)
        keeping = group.create_task(table.run())
        yield table, server
        keeping.cancel()


async def until_none(links: LinkBook) -> None:
    while len(links):
        await asyncio.sleep(0.001)


async def test_memory_is_open_as_long_as_the_link_is() -> None:
    memory = Memory()
    opener = FakeOpener(memory)
    links = book([opener])
    async with linking(links, offer([FakeSharedPool(memory)])) as (table, server):
        told = await table.connect(server.address)
        assert (told.transport, told.reason) == (SHARED_MEMORY, "same host")
        async with table.using(server.address) as link:
            assert links.find(link.agreement.link_id, SHARED_MEMORY)
            await table.retire(link)
            assert len(links) == 1
        await until_none(links)
        assert opener.opened[0].closed


async def test_a_payload_is_timed() -> None:
    async with linking(book(), offer()) as (table, server):
        told = await table.connect(server.address)
        assert told.transport == GRPC
        assert told.bytes_per_second > 1e6


async def test_a_receiver_that_goes_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with linking(book(), offer()) as (table, server):
        await table.connect(server.address)
        server.close()
        while table.report:
            await asyncio.sleep(0.001)
        assert "link with decode worker" in caplog.text
        with pytest.raises(UnavailableError):
            await table.connect(server.address)


async def test_a_receiver_that_knows_no_links_is_not_linked_with() -> None:
    async with (
        asyncio.timeout(PATIENCE),
        serving_kv({}, "127.0.0.1", 0) as server,
        asyncio.TaskGroup() as group,
    ):
        table = LinkTable(offer(), Connection.open)
        keeping = group.create_task(table.run())
        with pytest.raises(UnavailableError, match="UNIMPLEMENTED"):
            await table.connect(server.address)
        keeping.cancel()


async def test_a_connection_that_was_lost_a_moment_ago_is_not_used() -> None:
    async with linking(book(), offer()) as (table, server):
        async with table.using(server.address) as link:
            await link.connection.close()
        async with table.using(server.address) as other:
            assert other is not link
            assert not other.connection.closed
