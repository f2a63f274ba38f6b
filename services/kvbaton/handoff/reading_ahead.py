"""A transfer's payloads in turn: while one is being sent, a device copies the next."""

from collections.abc import Sequence
from typing import Protocol

from kvbaton.engine.kv_store import KvStore, Reading
from kvbaton.handoff.frames import Rectangle
from kvbaton.handoff.pending import settled


class Rectangles(Protocol):
    """What is to be sent, as it gets ready."""

    @property
    def blocks(self) -> Sequence[int]:
        """The request's whole block list."""
        ...

    async def next(self) -> Rectangle | None:
        """The next one, once it is ready; None when there are no more."""
        ...

    def next_ready(self) -> Rectangle | None:
        """The next one, if it is ready now."""
        ...


class ReadingAhead:
    """Reads what `rectangles` hands out, one ahead of what is being sent."""

    def __init__(self, store: KvStore, rectangles: Rectangles) -> None:
        self._store, self._rectangles = store, rectangles
        self._current: Reading | None = None
        self._ahead: tuple[Rectangle, Reading] | None = None

    async def next(self) -> tuple[Rectangle, Sequence[memoryview]] | None:
        """The next rectangle and its payload, good until the next call; None when there are no more.

        Whoever gives up in between need not say so. Raises RuntimeError when a device has failed.
        """
        if self._current is not None:
            self._current.release()
            self._current = None
        frame = self._ahead or self._begun(await self._rectangles.next())
        if frame is None:
            return None
        rectangle, self._current = frame
        # Where the host reads by itself, reading ahead would only make this one late.
        copying = self._current.pending is not None
        self._ahead = self._begun(self._rectangles.next_ready()) if copying else None
        await settled(self._current.pending)
        return rectangle, self._current.parts

    def _begun(self, rectangle: Rectangle | None) -> tuple[Rectangle, Reading] | None:
        if rectangle is None:
            return None
        return rectangle, self._store.read_ahead(rectangle.layers, self._rectangles.blocks, rectangle.tokens)
