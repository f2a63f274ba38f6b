"""How a step's prompt tokens are divided: all of them, the best priority first, half for the first in line, and the
shortest first beside it. So neither long nor short prompts starve.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine.chunking import share
from kvbaton.engine.request import Milestones, Request, Route
from kvbaton.engine.sampling import SamplingParams


def prompt(num_tokens: int, arrival: int = 0, priority: int = 0) -> Request:
    sampling = SamplingParams(max_tokens=1, seed=0)
    tokens = range(num_tokens)
    return Request(str(arrival), tokens, sampling, Route.LOCAL, Milestones(0.0), arrival=arrival, priority=priority)


def divided(lengths: list[int], budget: int) -> list[int]:
    prompts = [prompt(length, arrival) for arrival, length in enumerate(lengths)]
    served = dict(share(prompts, budget))
    return [served.get(request, 0) for request in prompts]


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 8, []),
        ([20], 8, [8]),
        ([3, 4], 8, [3, 4]),
        ([20, 2], 8, [6, 2]),
        ([20, 20], 8, [8, 0]),
        ([20, 20, 3, 2], 8, [4, 0, 2, 2]),
        ([20, 5, 3, 1], 8, [4, 0, 3, 1]),
        ([2, 20, 5], 8, [2, 1, 5]),
        ([20, 1], 1, [1, 0]),
        ([20, 20, 20], 7, [7, 0, 0]),
        ([20, 19, 19], 7, [4, 3, 0]),
        ([4, 4], 0, [0, 0]),
    ],
)
def test_shares(lengths: list[int], budget: int, expected: list[int]) -> None:
    assert divided(lengths, budget) == expected


def test_a_better_priority_takes_what_it_needs_first() -> None:
    urgent, first, second = prompt(6, 5, priority=-1), prompt(20, 1), prompt(3, 2)
    assert share([urgent, first, second], 10) == [(urgent, 6), (first, 2), (second, 2)]
    assert share([urgent, first, second], 5) == [(urgent, 5)]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=8),
    budget=st.integers(0, 60),
)
def test_the_budget_is_used_up_and_nobody_gets_too_much(lengths: list[tuple[int, int]], budget: int) -> None:
    prompts = [prompt(length, arrival, priority) for arrival, (length, priority) in enumerate(lengths)]
    prompts.sort(key=lambda request: request.rank)
    shares = share(prompts, budget)
    assert sum(tokens for _, tokens in shares) == min(budget, sum(request.num_prompt for request in prompts))
    assert all(0 < tokens <= request.num_prompt for request, tokens in shares)
    assert [request for request, _ in shares] == [request for request in prompts if request in dict(shares)]
    if budget:
        assert dict(shares)[prompts[0]] >= min(prompts[0].num_prompt, (budget + 1) // 2)


def steps_until_done(arrivals: dict[int, list[int]], budget: int) -> list[int]:
    """Prompts of the given lengths arrive at the given steps; for each, how many steps passed until it was computed."""
    waiting: list[Request] = []
    arrived: list[int] = []
    took: dict[int, int] = {}
    step = 0
    while waiting or step <= max(arrivals):
        for length in arrivals.get(step, []):
            waiting.append(prompt(length, len(arrived)))
            arrived.append(step)
        step += 1
        for request, tokens in share(waiting, budget):
            request.num_computed += tokens
            if not request.num_uncomputed:
                took[request.arrival] = step - arrived[request.arrival]
                waiting.remove(request)
    return [took[index] for index in range(len(arrived))]


def test_short_prompts_pass_a_long_one_and_it_loses_no_more_than_half() -> None:
    # In order of arrival alone, the first short one would wait for 16 steps; alone, the long one would take 16.
    arrivals = {0: [32_768], **{step: [256, 256] for step in range(1, 40)}}
    long, *short = steps_until_done(arrivals, budget=2048)
    assert max(short) == 1
    assert 16 < long <= 32


def test_a_flood_of_short_prompts_starves_nobody() -> None:
    # More arrives than can be computed: those that come first are done first nevertheless, or nearly.
    arrivals = {0: [32_768], **{step: [256] * 8 for step in range(60)}}
    long, *short = steps_until_done(arrivals, budget=2048)
    assert long <= 32
    assert max(short) <= 40


def test_several_long_prompts_are_computed_one_after_another() -> None:
    assert steps_until_done({0: [8192, 8192, 8192]}, budget=2048) == [4, 8, 12]
