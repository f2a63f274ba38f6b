"""The seam between a link and the memory that it gives access to: one pair of classes for each reference transport.

The sender offers its pool (`SharedPool`); the receiver opens it (`PoolOpener`) and copies from it (`ForeignPool`). The
conversation of a link knows nothing else of either.
"""

from collections.abc import Sequence
from typing import Protocol

from kvbaton.v1 import kv_transfer_pb2 as pb


class SharedPool(Protocol):
    """This worker's own pool, as one reference transport shows it to receivers. Lives as long as the worker."""

    @property
    def transport(self) -> str:
        """One of `choice.BEST_FIRST`, and never "grpc"."""
        ...

    @property
    def probe_bytes(self) -> int:
        """Size of the memory for probes, which no block uses."""
        ...

    def describe(self, hello: pb.LinkHello) -> None:
        """Fill in how the pool lies in memory, and what opens it."""
        ...

    async def hand_over(self, welcome: pb.LinkWelcome) -> None:
        """Do what the receiver needs before it can open the pool. Raises UnavailableError that says why it cannot."""
        ...

    def write_probe(self, pattern: bytes) -> None:
        """Put a pattern where the receiver looks for it; links take turns. On return the receiver can see it."""
        ...


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


class PoolOpener(Protocol):
    """The receiver's side of one reference transport. Lives as long as the worker."""

    @property
    def transport(self) -> str:
        """One of `choice.BEST_FIRST`, and never "grpc"."""
        ...

    def obstacle(self, hello: pb.LinkHello) -> str:
        """What speaks against it, besides what the two hosts' identities say; empty for nothing."""
        ...

    def invite(self, link_id: bytes) -> str:
        """A link begins: the name of the socket that takes the descriptor of its memory, or nothing."""
        ...

    def open(self, hello: pb.LinkHello, link_id: bytes) -> ForeignPool:
        """The sender's pool, once the sender has handed it over; waits for nothing.

        Raises UnavailableError that says why it cannot be opened.
        """
        ...

    def forget(self, link_id: bytes) -> None:
        """The link has ended, however far it came. Called once for each `invite`."""
        ...
