"""The seam between a link and the memory that it gives access to: one pair of classes for each reference transport.

The sender offers its pool (`SharedPool`); the receiver opens it (`PoolOpener`) and copies from it (`ForeignPool`). The
conversation of a link knows nothing else of either.
"""

from typing import Protocol

from kvbaton.engine.kv_store import ForeignPool
from kvbaton.v1 import kv_transfer_pb2 as pb

__all__ = ["ForeignPool", "PoolOpener", "SharedPool"]


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
