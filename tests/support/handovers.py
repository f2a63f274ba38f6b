"""KV moved between two stores, by every transport that there is: over real streams, and nothing else in between."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from kvbaton.engine.kv_store import KvStore
from kvbaton.handoff.sender import OutgoingTransfer, TransferReport
from support.chaos import ends


@dataclass(frozen=True, slots=True)
class Place:
    """A request's KV in somebody's memory."""

    store: KvStore
    blocks: list[int]


Move = Callable[[Place, Place, range, int], Awaitable[TransferReport]]
"""Moves tokens from one place to another; layers with a sliding window leave out those before the last argument."""


@asynccontextmanager
async def over_grpc() -> AsyncIterator[Move]:
    """By payloads on a stream."""
    async with ends(direct=True) as made:

        async def move(source: Place, target: Place, tokens: range, window_start: int) -> TransferReport:
            made.source, made.sink = source.store, target.store  # type: ignore[assignment]
            reservation = made.book.open(target.blocks, tokens, 1000, made.applied.append, window_start)
            outgoing = OutgoingTransfer(source.store.geometry, tokens)
            outgoing.cached(tokens.stop, source.blocks)
            outgoing.first_token(77)
            report = await made.send(reservation, outgoing)
            assert made.applied.pop() == 77
            return report

        yield move


TRANSPORTS: dict[str, Callable[[], AbstractAsyncContextManager[Move]]] = {"grpc": over_grpc}
"""By name."""
