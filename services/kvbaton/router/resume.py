"""How often, and how soon, an answer that a worker handed back is tried again: pure bookkeeping."""

from dataclasses import dataclass

from kvbaton.engine.errors import OverloadedError

FRUITFUL_TOKENS = 8
"""An attempt that brought as many tokens was worth its prefill, and the next one need not wait."""
MAX_FRUITLESS = 50
"""Attempts in a row that may bring fewer; the waits between them add up to 45 seconds."""
FIRST_WAIT_SECONDS = 0.02
LONGEST_WAIT_SECONDS = 1.0


@dataclass(slots=True)
class ResumeBudget:
    """Of one answer. Every attempt brings a token at least, so an answer always ends; this says when that is too slow.

    A worker preempts whom it admitted last, and a resumed request has just been admitted: while others hold the pool it
    may come back at once, again and again, and each time its prefix is computed or moved anew. So it stays away for
    longer each time, until an attempt gets somewhere.
    """

    num_fruitless: int = 0

    def wait_after(self, num_new_tokens: int) -> float:
        """Seconds to wait after an attempt that brought `num_new_tokens` and was handed back.

        Raises OverloadedError when it has been to no avail too often.
        """
        if num_new_tokens >= FRUITFUL_TOKENS:
            self.num_fruitless = 0
            return 0.0
        self.num_fruitless += 1
        if self.num_fruitless > MAX_FRUITLESS:
            problem = f"handed back {self.num_fruitless} times in a row with fewer than {FRUITFUL_TOKENS} new tokens"
            raise OverloadedError(f"{problem}: the decode workers have too little KV memory for what they serve")
        return float(min(FIRST_WAIT_SECONDS * 2 ** (self.num_fruitless - 1), LONGEST_WAIT_SECONDS))
