"""What a frame carries of a rectangle of KV: its payload, or the blocks where the receiver finds it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvbaton.engine.kv_store import Buffer, KvStore
from kvbaton.handoff.codec import crc32c, encode_frame_start, encode_reference
from kvbaton.handoff.frames import Rectangle
from kvbaton.handoff.pending import settled
from kvbaton.handoff.reading_ahead import ReadingAhead, Rectangles
from kvbaton.v1 import kv_transfer_pb2 as pb


@dataclass(frozen=True, slots=True)
class Piece:
    """The next frame's content."""

    rectangle: Rectangle
    crc32c: int
    num_bytes: int
    """Of the payload."""
    message: Callable[[pb.FrameInfo], Sequence[Buffer]]
    """The frame's message, in parts, from what identifies it."""


class Pieces(Protocol):
    """A transfer's content, one frame after another."""

    async def next(self) -> Piece | None:
        """The next, once it is ready, good until the next call; None when there are no more.

        Raises RuntimeError when a device has failed.
        """
        ...


class Payloads:
    """`Pieces` that carry KV."""

    def __init__(self, store: KvStore, rectangles: Rectangles) -> None:
        self._store, self._rectangles = store, rectangles
        self._reading = ReadingAhead(store, rectangles)

    async def next(self) -> Piece | None:
        """See `Pieces.next`."""
        payload = await self._reading.next()
        if payload is None:
            return None
        rectangle, parts = payload
        size = sum(map(len, parts))
        return Piece(
            rectangle, self._checksum(rectangle, parts), size, lambda info: [encode_frame_start(info, size), *parts]
        )

    def _checksum(self, rectangle: Rectangle, parts: Sequence[memoryview]) -> int:
        if len(parts) == 1 or self._store.shared is None:
            return crc32c(parts)
        # The parts are the pool's own memory, which it sums up in one go.
        return self._store.checksum(rectangle.layers, self._rectangles.blocks, rectangle.tokens)


class References:
    """`Pieces` that name blocks, which must be held until the receiver has copied from them."""

    def __init__(self, store: KvStore, rectangles: Rectangles, *, checked: bool) -> None:
        """`checked`: whether frames have checksums. On a GPU the KV would have to leave the device for them."""
        self._store, self._rectangles, self._checked = store, rectangles, checked

    async def next(self) -> Piece | None:
        """See `Pieces.next`."""
        rectangle = await self._rectangles.next()
        if rectangle is None:
            return None
        layers, tokens, size = rectangle.layers, rectangle.tokens, self._store.block_size
        await settled(self._store.written(layers))
        blocks = self._rectangles.blocks
        checksum = self._store.checksum(layers, blocks, tokens) if self._checked else 0
        named = blocks[tokens.start // size : (tokens.stop - 1) // size + 1]
        num_bytes = self._store.geometry.span_bytes(layers.start, layers.stop, len(tokens))
        return Piece(rectangle, checksum, num_bytes, lambda info: [encode_reference(info, named)])
