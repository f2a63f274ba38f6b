"""Requests in the order in which they are served."""

from bisect import bisect_left
from collections.abc import Iterator

from kvbaton.engine.request import Request


class RankedRequests:
    """A set of requests, ordered by priority and then arrival.

    Two sorted lists: moving some hundreds of pointers is cheaper than any tree in Python.
    """

    def __init__(self) -> None:
        self._ranks: list[tuple[int, int]] = []
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, index: int) -> Request:
        return self._requests[index]

    def add(self, request: Request) -> None:
        """Put a request where it belongs. It must not be there."""
        index = bisect_left(self._ranks, request.rank)
        self._ranks.insert(index, request.rank)
        self._requests.insert(index, request)

    def discard(self, request: Request) -> None:
        """Take a request out, if it is there."""
        index = bisect_left(self._ranks, request.rank)
        if index < len(self) and self._requests[index] is request:
            del self._ranks[index]
            del self._requests[index]
