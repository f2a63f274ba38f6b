"""Pinned host memory for frames: a few buffers that are used over and over. Taken by one thread, the KV loop's.

Pinning is slow, and what is pinned is taken from everyone else; so a few are kept, of the size of a frame. Where all of
them are in use the next one is new, so that nobody waits for a peer that does not read.
"""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

FRAME = 4 << 20
"""Bytes of a buffer: a frame's payload."""

BUFFERS = 4
"""One on the wire, one being copied, and the same for a second transfer."""


class Event(Protocol):
    """What `torch.cuda.Event` can do."""

    def query(self) -> bool:
        """Whether the device has come past it."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...


class Lease:
    """A buffer in use. Given back by `release`, or when nobody knows of it any more."""

    def __init__(self, ring: "PinnedRing", buffer: torch.Tensor, size: int) -> None:
        self.bytes = buffer[:size]
        """[size] of uint8, pinned."""
        # Shared with the finalizer, which must not know the lease itself.
        self._last_use: list[Event] = []
        self._end = weakref.finalize(self, ring.give_back, buffer, self._last_use)
        self._end.atexit = False

    def used_until(self, event: Event) -> None:
        """The device reads or writes the buffer until `event`: nobody else gets it before."""
        self._last_use[:] = [event]

    def release(self) -> None:
        """The host is done with it. Doing it twice is harmless."""
        self._end()


class PinnedRing:
    """Buffers of one size."""

    def __init__(self, pinned: Callable[[int], torch.Tensor], num_buffers: int = BUFFERS, size: int = FRAME) -> None:
        """`pinned` makes a tensor [bytes] of uint8; `num_buffers` of them are kept."""
        self._pinned, self._num_buffers, self._size = pinned, num_buffers, size
        self._free: deque[tuple[torch.Tensor, list[Event]]] = deque()

    def take(self, size: int) -> Lease:
        """A buffer for `size` bytes: one that is free, or where there is none, or none so large, a new one."""
        if size > self._size:
            return Lease(self, self._pinned(size), size)
        if self._free and all(event.query() for event in self._free[0][1]):
            return Lease(self, self._free.popleft()[0], size)
        return Lease(self, self._pinned(self._size), size)

    def give_back(self, buffer: torch.Tensor, last_use: list[Event]) -> None:
        """A lease has ended, on any thread. What is too much goes back to torch, which knows who still uses it."""
        if len(buffer) == self._size and len(self._free) < self._num_buffers:
            self._free.append((buffer, last_use))
