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
    """Prompt tokens of those requests."""
    num_queued: int
    """Requests that the worker last reported as waiting."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen pair, and why."""

    prefill: str
    decode: str
    reason: str


def choose_pair(prefill: Sequence[Candidate], decode: Sequence[Candidate], rng: random.Random) -> Choice:
    """The prefill worker with the fewest prompt tokens before it, the decode worker with the fewest sequences.

    Ties are broken at random, so that routers which see the same state do not all choose the same worker. Raises
    UnavailableError, naming the role, when one has no candidate.
    """
    if not prefill:
        raise UnavailableError("no prefill worker is ready")
    if not decode:
        raise UnavailableError("no decode worker is ready")
    first = min(prefill, key=lambda c: (c.tokens_in_flight, c.num_queued, rng.random()))
    second = min(decode, key=lambda c: (c.num_in_flight, c.num_queued, rng.random()))
    reason = (
        f"prefill {first.address}: {first.tokens_in_flight} tokens before it, least of {len(prefill)}; "
        f"decode {second.address}: {second.num_in_flight} sequences, least of {len(decode)}"
    )
    return Choice(first.address, second.address, reason)
