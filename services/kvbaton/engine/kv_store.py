"""The seam between KV memory and whoever moves it: bytes in, bytes out, no tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvbaton.engine.geometry import KvGeometry

Buffer = bytes | bytearray | memoryview
"""Any contiguous bytes."""


@dataclass(frozen=True, slots=True)
class Landing:
    """A place for a payload that is about to arrive."""

    parts: Sequence[memoryview]
    """Writable; one after the other they take the payload."""
    finish: Callable[[], None]
    """Call it when they are full: the payload is then in its blocks. Until then those may hold any part of it."""


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

    def read(self, layers: range, blocks: Sequence[int], tokens: range) -> Sequence[memoryview]:
        """The KV of `tokens` in `layers`, as parts which one after the other are a payload.

        They may be views of the memory itself, and so hold good as long as the blocks are held.
        """
        ...

    def encoded(self, encoding: str) -> "KvStore":
        """The same memory, whose payloads are as `encoding` has them; itself for none.

        Raises ValueError for an unknown encoding.
        """
        ...

    def landing(self, layers: range, blocks: Sequence[int], tokens: range) -> Landing:
        """Where to receive a payload. Nobody else may write those blocks, or read them, before it is finished."""
        ...
