"""What a request's answer must look like, as the engine sees it: told each token, it masks the next."""

from typing import Any, Protocol


class Constraint(Protocol):
    """State of one sequence within a grammar. It follows from the accepted tokens alone, so a resume replays them."""

    def accept(self, token_id: int) -> None:
        """The sequence has grown by `token_id`; EOS after a complete answer included."""
        ...

    def fill(self, bitmask: Any, row: int) -> None:
        """Write which tokens may come next into `bitmask[row]`.

        `bitmask` is a torch int32 tensor on the CPU, [rows, ceil(vocab / 32)], bit `token % 32` of word `token // 32`.
        """
        ...
