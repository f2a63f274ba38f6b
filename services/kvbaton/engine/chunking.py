"""Which prompts a step computes, and how much of each."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from kvbaton.engine.request import Request


def share(prompts: Iterable[Request], budget: int) -> list[tuple[Request, int]]:
    """Divide `budget` tokens among prompts, which come by priority and then arrival: (request, tokens) of each served.

    Priorities are served one after another. Within one, the first in line is sure of half of what there is, and the
    others take their turns at the rest by what they have left, the shortest first; what one side does not need the
    other has. So a short prompt slips in beside a long one, and a long one, being first in line at some time, is
    finished in at most twice the steps that it takes alone, whatever comes after it. Shortest-remaining first is the
    order that makes the mean wait the smallest (Schrage 1968); the half for the first is what it costs to starve
    nobody.
    """
    shares: list[tuple[Request, int]] = []
    for _, group in groupby(prompts, key=lambda request: request.priority):
        if budget == 0:
            break
        served = _share_equals(list(group), budget)
        budget -= sum(num_tokens for _, num_tokens in served)
        shares += served
    return shares


def _share_equals(prompts: Sequence[Request], budget: int) -> list[tuple[Request, int]]:
    needs = [request.num_uncomputed for request in prompts]
    granted = [0] * len(prompts)
    rest = budget - min(needs[0], budget - budget // 2)
    for index in sorted(range(1, len(prompts)), key=needs.__getitem__):
        if rest == 0:
            break
        granted[index] = min(needs[index], rest)
        rest -= granted[index]
    granted[0] = min(needs[0], budget - sum(granted))
    return [(request, tokens) for request, tokens in zip(prompts, granted, strict=True) if tokens]
