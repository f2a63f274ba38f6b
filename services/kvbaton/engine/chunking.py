"""Which prompts a step computes, and how much of each."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from kvbaton.engine.request import Request


def share(prompts: Iterable[Request], budget: int) -> list[tuple[Request, int]]:
    """Divide `budget` tokens among prompts, which come by priority and then arrival: (request, tokens) of each served.

    Priorities are served one after another. Within one, prompts are served by what they have left, the shortest first,
    but half of the tokens is kept for the one that came first. So a short prompt passes a long one, equal ones follow
    one another, and the first in line is done in at most twice the steps that it takes alone, whatever comes after it.
    Shortest-remaining first is the order with the smallest mean wait (Schrage 1968); the half is the price of starving
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
    kept = min(needs[0], budget - budget // 2)
    for index in sorted(range(len(prompts)), key=needs.__getitem__):
        if index == 0:
            kept = 0
        granted[index] = min(needs[index], budget - kept)
        budget -= granted[index]
    return [(request, tokens) for request, tokens in zip(prompts, granted, strict=True) if tokens]
