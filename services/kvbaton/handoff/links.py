"""A sender's links: one connection to each receiver, and what was agreed on over it.

Life of a link: first asked for -> connected and agreed (once, however many wait for it) -> used by transfers -> its
stream ends, a receiver does not know it any more, or another needs its place: nobody gets it any more, and its
connection is closed when the last transfer has left it. Whoever asks next links anew.
"""

import asyncio
import contextlib
import contextvars
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from kvbaton.engine.errors import KvbatonError, OverloadedError, UnavailableError
from kvbaton.handoff.agreement import Agreement, LinkOffer
from kvbaton.handoff.http2.calls import ClientStream
from kvbaton.handoff.http2.client import Connection
from kvbaton.v1 import worker_pb2

logger = logging.getLogger(__name__)

LINK_METHOD = "/kvbaton.v1.KvTransferService/Link"
CONNECT_TIMEOUT_SECONDS = 10.0
MAX_LINKS = 256
"""Most receivers that a sender is linked with at once; the one unused longest makes room."""


@dataclass(slots=True, eq=False)
class Link:
    """A connection, and how KV travels beside it."""

    endpoint: str
    connection: Connection
    agreement: Agreement
    num_users: int = 0
    """Transfers that run over it."""
    retired: bool = False
    """Whether nobody gets it any more."""

    @property
    def transport(self) -> str:
        """The one that was chosen."""
        return self.agreement.choice.transport

    def to_proto(self) -> worker_pb2.PeerLink:
        """As a worker's status tells it."""
        choice = self.agreement.choice
        return worker_pb2.PeerLink(
            endpoint=self.endpoint,
            transport=choice.transport,
            reason=choice.reason,
            bytes_per_second=choice.bytes_per_second,
        )


class LinkTable:
    """All links of a sending worker. Belongs to one event loop, on which `run` must be running."""

    def __init__(
        self, offer: LinkOffer, connect: Callable[[str, float], Awaitable[Connection]], capacity: int = MAX_LINKS
    ) -> None:
        """`connect(endpoint, timeout)` opens a connection, or raises UnavailableError."""
        self.report: tuple[worker_pb2.PeerLink, ...] = ()
        """The links of the moment; any thread may look."""
        self._offer = offer
        self._connect = connect
        self._capacity = capacity
        self._links: OrderedDict[str, Link] = OrderedDict()
        self._pending: dict[str, asyncio.Future[Link]] = {}
        self._retired: set[Link] = set()
        self._group: asyncio.TaskGroup
        self._running = asyncio.Event()

    async def run(self) -> None:
        """Keep links until cancelled; all connections are closed then."""
        try:
            async with asyncio.TaskGroup() as self._group:
                self._running.set()
                await asyncio.get_running_loop().create_future()
        finally:
            for link in [*self._links.values(), *self._retired]:
                await link.connection.close()

    @contextlib.asynccontextmanager
    async def using(self, endpoint: str) -> AsyncIterator[Link]:
        """A link to host:port, which is not closed before the block ends, unless by its other end.

        Raises UnavailableError when the receiver cannot be reached, or no transport is left, and OverloadedError when
        links to too many others are in use.
        """
        link = await self._get(endpoint)
        if link.retired:
            # It has ended between its agreement and now.
            link = await self._get(endpoint)
        link.num_users += 1
        try:
            yield link
        finally:
            link.num_users -= 1
            await self._close_if_done(link)

    async def connect(self, endpoint: str, incarnation: str = "") -> worker_pb2.PeerLink:
        """Link before a transfer needs it; with another process than `incarnation`, if given, link anew.

        Raises as `using`.
        """
        link = self._links.get(endpoint)
        if link is not None and incarnation not in ("", link.agreement.incarnation):
            await self.retire(link)
        return (await self._get(endpoint)).to_proto()

    async def retire(self, link: Link) -> None:
        """Nobody is to get this link any more; transfers that run over it are left alone."""
        if not link.retired:
            link.retired = True
            if self._links.get(link.endpoint) is link:
                del self._links[link.endpoint]
            self._retired.add(link)
            self._tell()
        await self._close_if_done(link)

    async def _get(self, endpoint: str) -> Link:
        link = self._links.get(endpoint)
        if link is not None and link.connection.closed:
            # Whoever follows its stream has not had its turn yet.
            await self.retire(link)
            link = self._links.get(endpoint)
        if link is not None:
            self._links.move_to_end(endpoint)
            return link
        pending = self._pending.get(endpoint)
        if pending is None:
            await self._running.wait()
            pending = self._pending.get(endpoint)
        if pending is None:
            self._check_room()
            pending = self._pending[endpoint] = asyncio.get_running_loop().create_future()
            # In no request's trace: it outlives the one that happens to come first.
            self._group.create_task(self._link(endpoint, pending), context=contextvars.Context())
        # Others wait for it too: it goes on when this one is cancelled.
        return await asyncio.shield(pending)

    def _check_room(self) -> None:
        in_use = sum(link.num_users > 0 for link in self._links.values()) + len(self._pending)
        if in_use >= self._capacity:
            raise OverloadedError(f"{in_use} links are in use, the most that a worker has")

    async def _link(self, endpoint: str, pending: "asyncio.Future[Link]") -> None:
        try:
            link, stream = await self._agree(endpoint)
        except BaseException as error:
            # To those who wait, and not into the task group, which all links share.
            del self._pending[endpoint]
            pending.set_exception(error if isinstance(error, Exception) else UnavailableError("the worker is ending"))
            # Nobody may be left who asks.
            pending.exception()
            if not isinstance(error, Exception):
                raise
            return
        del self._pending[endpoint]
        self._links[endpoint] = link
        pending.set_result(link)
        self._tell()
        choice = link.agreement.choice
        logger.log(logging.WARNING if choice.warn else logging.INFO, choice.sentence(endpoint))
        await self._make_room()
        await self._follow(link, stream)

    async def _agree(self, endpoint: str) -> tuple[Link, ClientStream]:
        try:
            connection = await self._connect(endpoint, CONNECT_TIMEOUT_SECONDS)
            try:
                stream = connection.call(LINK_METHOD, None)
                agreement = await self._offer.agree(stream)
            except BaseException:
                await connection.close()
                raise
        except KvbatonError as error:
            reason = str(error).removeprefix(endpoint).lstrip(": ")
            raise UnavailableError(f"no link with decode worker {endpoint}: {reason}") from error
        return Link(endpoint, connection, agreement), stream

    async def _follow(self, link: Link, stream: ClientStream) -> None:
        """Until the link's stream ends: the receiver sends nothing more on it."""
        reason = "its stream has ended"
        try:
            if await stream.receive() is not None:
                reason = "a message came where none may"
        except (KvbatonError, TimeoutError) as error:
            reason = str(error)
        finally:
            stream.cancel()
        if not link.retired:
            logger.info("link with decode worker %s ended: %s", link.endpoint, reason)
        await self.retire(link)

    async def _make_room(self) -> None:
        idle = [link for link in self._links.values() if not link.num_users]
        for link in idle[: max(0, len(self._links) - self._capacity)]:
            await self.retire(link)

    async def _close_if_done(self, link: Link) -> None:
        if link.retired and not link.num_users and link in self._retired:
            self._retired.discard(link)
            await link.connection.close()

    def _tell(self) -> None:
        self.report = tuple(link.to_proto() for link in self._links.values())
