"""The seam between KV memory and whoever moves it: bytes in, bytes out, no tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.pool_layout import PoolLayout

Buffer = bytes | bytearray | memoryview
"""Any contiguous bytes."""


@dataclass(frozen=True, slots=True)
class Landing:
    """A place for a payload that is about to arrive."""

    parts: Sequence[memoryview]
    """Writable; one after the other they take the payload."""
    finish: Callable[[], None]
    """Call it when they are full: the payload is then in its blocks, once `KvStore.landed` is done.

    Until then those may hold any part of it.
    """


class Pending(Protocol):
    """Work that a device does by itself."""

    def done(self) -> bool:
        """Whether it is done. Raises RuntimeError when the device has failed."""
        ...

    def wait(self) -> None:
        """Return when it is done; any thread may wait. Raises RuntimeError when the device has failed."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """A payload on its way out of the memory."""

    parts: Sequence[memoryview]
    """One after the other they are the payload, once `pending` is done."""
    pending: Pending | None
    """None: they hold it already."""
    release: Callable[[], None]
    """Call it when the parts are no longer needed: they may then be used for something else."""


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """A pool that other processes can map, and then read."""

    layout: PoolLayout
    descriptor: int
    """Of the whole memory, read-only; the store's own, open as long as the store is there."""
    probe: memoryview
    """The layout's probe area, writable."""


class ForeignPool(Protocol):
    """A sender's pool, as the receiver sees it: read, never written."""

    def probe(self, num_bytes: int) -> tuple[int, float]:
        """CRC32C of the first `num_bytes` bytes of probe memory, and the seconds that one copy of them took."""
        ...

    def copy(self, layers: range, theirs: Sequence[int], tokens: range, blocks: Sequence[int]) -> int | None:
        """Copy the KV of `tokens` into our own store and return the payload's CRC32C, as it would be on the wire.

        `theirs` are the sender's blocks, of which the first holds `tokens.start`; `blocks` is the whole block list of
        our own request. None where the copy is made by a device that computes no checksums. Raises
        TransferRejectedError for blocks that the sender does not have.
        """
        ...

    def close(self) -> None:
        """Let go of the memory. Never called while a copy runs."""
        ...


class KvStore(Protocol):
    """KV memory of one worker, addressed by layer, block list and token.

    `blocks` is the request's whole block list; token t lies in `blocks[t // block_size]`. Bytes are laid out as a
    `KvFrame` payload is: for each layer K `[tokens, num_kv_heads, k_head_dim]`, then V `[tokens, num_kv_heads,
    v_head_dim]`, row-major, little-endian, in the geometry's dtype.
    """

    @property
    def geometry(self) -> KvGeometry:
        """The shape of one token's KV."""
        ...

    @property
    def shared(self) -> SharedMemory | None:
        """How other processes can map this memory; None where they cannot."""
        ...

    def read(self, layers: range, blocks: Sequence[int], tokens: range) -> Sequence[memoryview]:
        """The KV of `tokens` in `layers`, as parts which one after the other are a payload.

        They may be views of the memory itself, and so hold good as long as the blocks are held.
        """
        ...

    def checksum(self, layers: range, blocks: Sequence[int], tokens: range) -> int:
        """CRC32C of the payload that `read` would give, and much cheaper than that of its parts one by one."""
        ...

    def map_foreign(self, descriptor: int, layout: PoolLayout) -> ForeignPool:
        """Another process's pool, to be copied from into this one. The descriptor stays the caller's.

        Raises UnavailableError where this one is not in host memory, or for memory or a layout that cannot be trusted.
        """
        ...

    def encoded(self, encoding: str) -> "KvStore":
        """The same memory, whose payloads are as `encoding` has them; itself for none.

        Raises ValueError for an unknown encoding.
        """
        ...

    def read_ahead(self, layers: range, blocks: Sequence[int], tokens: range) -> Reading:
        """Begin a `read`, and do not wait for it: a device copies while what was read before is being sent."""
        ...

    def written(self, layers: range) -> Pending | None:
        """Whether the KV of `layers` that the engine has reported is in the memory; None: it is."""
        ...

    def landing(self, layers: range, blocks: Sequence[int], tokens: range) -> Landing:
        """Where to receive a payload. Nobody else may write those blocks, or read them, before it is finished."""
        ...

    def landed(self) -> Pending | None:
        """Whether what was finished of landings so far, and copied from other pools, is in its blocks; None: it is."""
        ...

    def landings_follow_engine(self) -> None:
        """A transfer begins: what lands from now on comes after what the engine has told a device so far.

        Among that may be the last writes of a request that is no more to blocks that were its own.
        """
        ...

    def engine_follows_landings(self) -> None:
        """A reservation ends: what the engine tells a device from now on comes after what has landed. Any thread.

        Nothing may land in the reservation's blocks any more.
        """
        ...
