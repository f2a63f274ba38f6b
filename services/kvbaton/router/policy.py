"""Which workers serve a request: a pure function of what is known about them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.engine.errors import UnavailableError


@dataclass(frozen=True, slots=True)
class Candidate:
    """One usable worker, at the moment of the choice."""

    address: str
    num_in_flight: int
    """Requests that this router has on the worker."""
    tokens_in_flight: int
    """Tokens that it computes before those requests decode."""
    num_queued: int
    """Requests that the worker last reported as waiting."""
    prefills: bool = False
    """Of a candidate for decoding: whether it can compute the prompt itself."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes, and why."""

    prefill: str | None
    """None: the decode worker computes the prompt itself."""
    decode: str
    reason: str
    """A word of a closed list (`remote`, `unified`), and then the figures that decided."""


def choose(prefill: Sequence[Candidate], decode: Sequence[Candidate], rng: random.Random) -> Choice:
    """The decode worker with the fewest sequences; unless it prefills, the prefill worker with the fewest tokens.

    Ties are broken at random, so that routers which see the same state do not all choose the same worker. Raises
    UnavailableError, naming the leg, when one has no candidate.
    """
    if not prefill:
        raise UnavailableError("no prefill worker is ready")
    if not decode:
        raise UnavailableError("no decode worker is ready")
    second = min(decode, key=lambda c: (c.num_in_flight, c.num_queued, rng.random()))
    decoding = f"decode {second.address}: {second.num_in_flight} sequences, least of {len(decode)}"
    if second.prefills:
        return Choice(None, second.address, f"unified: {decoding}")
    first = min(prefill, key=lambda c: (c.tokens_in_flight, c.num_queued, rng.random()))
    prefilling = f"prefill {first.address}: {first.tokens_in_flight} tokens before it, least of {len(prefill)}"
    return Choice(first.address, second.address, f"remote: {prefilling}; {decoding}")
