"""When blocks run out the decode that ranks last is handed back, and nobody else; what is handed back can go on from
its tokens, and everybody is done some time.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.new_request import NewRequest
from kvbaton.engine.request import Phase, Request, Route
from kvbaton.engine.sampling import FinishReason
from kvbaton.engine.scheduler import Scheduler
from support.requests import new_request
from support.scheduling import BLOCK, NEVER_EOS, add, ended, names, output, params, scheduler, step, work


def decoding(of: Scheduler, name: str, num_prompt: int = 3, max_tokens: int = 40, **more: Any) -> Request:
    request = add(of, name, num_prompt, max_tokens, **more)
    while request.phase is not Phase.DECODING:
        assert step(of)
    return request


def until_preempted(of: Scheduler) -> list[Request]:
    while not (preempted := of.make_room(0.0)):
        batch = of.schedule(0.0)
        of.commit(batch, output(*[NEVER_EOS] * len(batch.slices)), 0.0)
    return preempted


def test_a_decode_takes_a_block_when_it_needs_one() -> None:
    of = scheduler(num_blocks=3)
    request = decoding(of, "a", num_prompt=3, max_tokens=8)
    held = []
    while not ended(request):
        held.append(len(request.blocks))
        assert step(of)
    assert held == [1, 1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize(
    ("priorities", "expected"),
    [((0, 0, 0), "third"), ((0, 1, 0), "second"), ((2, 1, 1), "first"), ((0, 0, -1), "second")],
)
def test_the_last_in_rank_is_handed_back(priorities: tuple[int, int, int], expected: str) -> None:
    of = scheduler(num_blocks=6)
    for name, priority in zip(("first", "second", "third"), priorities, strict=True):
        decoding(of, name, max_tokens=16, priority=priority)
    assert names(until_preempted(of)) == [expected]
    assert of.counters.requests_preempted == 1
    assert of.counts().decoding == 2
    of.check_integrity()


def test_what_is_handed_back_has_ended_here_without_a_reason_and_holds_nothing() -> None:
    of = scheduler(num_blocks=4)
    first, second = decoding(of, "first", max_tokens=14), decoding(of, "second", max_tokens=14)
    assert until_preempted(of) == [second]
    assert (second.phase, second.finish_reason, second.blocks) == (Phase.FINISHED, None, [])
    assert len(second.output) > 1
    assert names([piece.request for piece in of.schedule(0.0).slices]) == ["first"]
    while not ended(first):
        assert step(of)
    assert first.finish_reason is FinishReason.LENGTH


def test_as_many_are_handed_back_as_it_takes() -> None:
    of = scheduler(num_blocks=4)
    decoding(of, "first", num_prompt=4, max_tokens=12)
    decoding(of, "second", num_prompt=3, max_tokens=6)
    third = new_request("third", [8, 9], params(6))
    of.add(third, 0.0)
    # Somebody else's hold on its block frees nothing.
    shared = of._decoding[1].blocks
    of.pool.retain(shared)
    preempted = until_preempted(of)
    assert names(preempted) == ["second"]
    of.pool.release(shared)


def test_one_that_holds_nothing_that_others_need_is_not_handed_back() -> None:
    of = scheduler(num_blocks=6)
    decoding(of, "decodes", num_prompt=3, max_tokens=20)
    received = add(of, "received", num_prompt=15, max_tokens=2, route=Route.RECEIVE)
    of.admit(0.0)
    # It alone decodes, so it is the last in rank: what waits for KV is left in peace.
    assert names(until_preempted(of)) == ["decodes"]
    assert received.phase is Phase.RECEIVING


def test_a_lone_request_that_fits_the_pool_is_done() -> None:
    of = scheduler(num_blocks=10)
    request = add(of, "a", num_prompt=10, max_tokens=31)
    while not ended(request):
        assert step(of)
    assert len(request.output) == 31
    assert of.counters.requests_preempted == 0


@pytest.mark.parametrize("route", [Route.LOCAL, Route.HAND_OFF])
def test_a_resumed_request_computes_prompt_and_output_and_counts_from_the_answers_start(route: Route) -> None:
    of = scheduler(prefill=4)
    request = of.add(new_request("a", [11, 12, 13], params(5), route, output=[21, 22, 23]), 0.0)
    of.admit(0.0)
    fed = []
    while request.phase is Phase.PREFILLING:
        batch = of.schedule(0.0)
        (piece,) = batch.slices
        fed.append(list(piece.token_ids()))
        result = of.commit(batch, output(*[24] * piece.samples), 0.0)
    assert fed == [[11, 12, 13, 21], [22, 23]]
    assert [(event.index, event.token_id, event.finish_reason) for event in result.sampled] == [(3, 24, None)]
    if route is Route.LOCAL:
        assert work(of.schedule(0.0)) == [("a", 6, 1, True)]
        step(of, token=25)
        assert request.output == [21, 22, 23, 24, 25]
        assert request.finish_reason is FinishReason.LENGTH


def test_a_resumed_request_may_be_received() -> None:
    of = scheduler()
    request = of.add(new_request("a", [11, 12, 13], params(6), Route.RECEIVE, output=[21, 22]), 0.0)
    of.admit(0.0)
    assert len(request.blocks) == 2
    (event,) = of.kv_received("a", 23, 0.0).sampled
    assert (event.index, event.finish_reason) == (2, None)
    assert step(of) == [("a", 5, 1, True)]


def test_a_resume_with_nothing_left_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="output_token_ids: 4 tokens leave nothing of max_tokens 4"):
        scheduler().add(new_request("a", [1], params(4), output=[1, 2, 3, 4]), 0.0)


@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.integers(3, 12),
    prefill=st.integers(1, 9),
    decode=st.integers(1, 4),
    shapes=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 20), st.integers(0, 1)), min_size=1, max_size=7),
)
def test_everybody_is_done_however_often_it_is_handed_back(
    num_blocks: int, prefill: int, decode: int, shapes: list[tuple[int, int, int]]
) -> None:
    of = scheduler(num_blocks=num_blocks, prefill=prefill, decode=decode, waiting=100)
    running: list[Request] = []
    for index, (num_prompt, max_tokens, priority) in enumerate(shapes):
        if num_prompt + max_tokens - 1 <= num_blocks * BLOCK:
            running.append(add(of, str(index), num_prompt, max_tokens, priority=priority))
    # Each time round, a request gains a token at least; a step at worst computes one token of one prompt.
    longest = num_blocks * BLOCK
    bound = sum(request.sampling.max_tokens for request in running) * (longest + 1) + 1
    for _ in range(bound):
        if all(ended(request) for request in running):
            break
        for request in of.make_room(0.0):
            running.remove(request)
            running.append(of.add(again(request), 0.0))
        assert step(of)
    assert all(request.finish_reason is FinishReason.LENGTH for request in running)
    assert of.pool.num_free == of.pool.num_blocks


def again(request: Request) -> NewRequest:
    """What a router makes of a request that was handed back."""
    return new_request(
        request.request_id,
        request.prompt,
        request.sampling,
        request.route,
        output=request.output,
        priority=request.priority,
    )
