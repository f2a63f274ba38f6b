"""Stop strings, found as text comes.

Aho and Corasick (1975), "Efficient string matching": one automaton for all the strings, one step a character whatever
their number, and its state is the longest end of the text that may still become a stop string.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string that the text has come to."""

    stop: str
    end: int
    """Characters of the text just fed, up to the end of the stop string."""


class StopFinder:
    """Finds the stop string that is complete first; of several that end together, the longest."""

    def __init__(self, stops: Sequence[str]) -> None:
        """None of `stops` is empty."""
        # By node; 0 is the root.
        self._children: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._fallback = [0]
        self._complete = [""]
        for stop in stops:
            self._insert(stop)
        self._link()
        self._node = 0

    @property
    def pending(self) -> int:
        """Characters at the end of the text that may be the start of a stop string."""
        return self._depth[self._node]

    def feed(self, text: str, *, armed: bool) -> StopMatch | None:
        """Go on over `text`, up to the first stop string; one that ends here is passed over unless `armed`."""
        if not self._children[0]:
            return None
        for at, character in enumerate(text):
            node = self._step(self._node, character)
            if armed and self._complete[node]:
                self._node = 0
                return StopMatch(self._complete[node], at + 1)
            # A whole stop string that was passed over is the start of none.
            while not self._children[node]:
                node = self._fallback[node]
            self._node = node
        return None

    def _step(self, node: int, character: str) -> int:
        while node and character not in self._children[node]:
            node = self._fallback[node]
        return self._children[node].get(character, 0)

    def _insert(self, stop: str) -> None:
        node = 0
        for character in stop:
            if character not in self._children[node]:
                self._children[node][character] = len(self._children)
                self._children.append({})
                self._depth.append(self._depth[node] + 1)
                self._fallback.append(0)
                self._complete.append("")
            node = self._children[node][character]
        self._complete[node] = stop

    def _link(self) -> None:
        """Point each node to that of its longest proper suffix, shallow nodes first."""
        todo = deque(self._children[0].values())
        while todo:
            node = todo.popleft()
            for character, child in self._children[node].items():
                fallback = self._step(self._fallback[node], character)
                self._fallback[child] = fallback
                self._complete[child] = self._complete[child] or self._complete[fallback]
                todo.append(child)
