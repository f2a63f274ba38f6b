"""The seam between KV memory and whoever moves it: bytes in, bytes out, no tensors."""

from collections.abc import Sequence
from typing import Protocol

from kvbaton.engine.geometry import KvGeometry

Buffer = bytes | bytearray | memoryview
"""Any contiguous bytes."""


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

    def read(self, layers: range, blocks: Sequence[int], tokens: range) -> list[memoryview]:
        """Copy out the KV of `tokens` in `layers`, as parts which concatenated are a payload."""
        ...

    def write(self, layers: range, blocks: Sequence[int], tokens: range, payload: Buffer) -> None:
        """Copy a payload in. The caller has checked its length; nobody else may write those blocks meanwhile."""
        ...
