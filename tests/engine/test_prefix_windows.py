"""Prefixes of models with sliding windows: blocks that were received in part are found where what is missing is seen by
nobody, and are not handed on.
"""

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase, Request, Route
from kvbaton.engine.scheduler import Limits, Scheduler
from support.requests import new_request
from support.scheduling import BLOCK, NEVER_EOS, ended, output, params

PROMPT = list(range(100, 140))
WINDOW = 6


class Worker:
    """A scheduler, and where in its memory the layers with a window have KV."""

    def __init__(self, window: int | None = WINDOW, num_blocks: int = 200, block_size: int = BLOCK) -> None:
        limits = Limits(max_prefill_tokens=100, max_decode_seqs=8, max_waiting=10)
        self.scheduler = Scheduler(BlockPool(num_blocks, block_size), limits, frozenset(), 1000, window)
        self.there = [[False] * block_size for _ in range(num_blocks)]
        self.serial = 0

    def run(self, prompt: list[int], route: Route, max_tokens: int = 3, **more: Any) -> Request:
        """A request from its admission to its end."""
        self.serial += 1
        of = self.scheduler
        request = of.add(new_request(str(self.serial), prompt, params(max_tokens), route, **more), 0.0)
        assert of.admit(0.0) == [request]
        size, cached = of.pool.block_size, request.num_cached
        low = 0 if of.window is None or route is Route.HAND_OFF else max(0, cached - of.window + 1)
        # Kernels read whole blocks.
        self.check(request, range(low - low % size, cached))
        if route is Route.RECEIVE:
            self.mark(request, range(cached, request.window_start), there=False)
            self.mark(request, range(request.window_start, request.num_prefill))
            of.kv_received(request.request_id, NEVER_EOS, 0.0)
        while not ended(request) and request.phase is not Phase.HANDING_OFF:
            of.make_room(0.0)
            batch = of.schedule(0.0)
            for piece in batch.slices:
                self.mark(request, range(piece.start, piece.start + piece.num_tokens))
                low = 0 if of.window is None else max(0, piece.start - of.window + 1)
                self.check(request, range(low - low % size, piece.start + piece.num_tokens))
            of.commit(batch, output(*[NEVER_EOS for piece in batch.slices if piece.samples]), 0.0)
        of.remove(request.request_id, 0.0)
        of.check_integrity()
        return request

    def mark(self, request: Request, tokens: range, *, there: bool = True) -> None:
        size = self.scheduler.pool.block_size
        for token in tokens:
            self.there[request.blocks[token // size]][token % size] = there

    def check(self, request: Request, tokens: range) -> None:
        size = self.scheduler.pool.block_size
        assert all(self.there[request.blocks[token // size]][token % size] for token in tokens)


@dataclass(frozen=True)
class Wish:
    """A request: a piece of the common prompt and some tokens of its own."""

    num_shared: int
    num_own: int
    route: Route
    num_output: int


WISHES = st.lists(
    st.builds(Wish, st.integers(0, len(PROMPT)), st.integers(1, 3), st.sampled_from(list(Route)), st.integers(0, 8)),
    max_size=6,
)


@given(
    wishes=WISHES, window=st.none() | st.integers(1, 30), block_size=st.integers(1, 7), num_blocks=st.integers(60, 99)
)
@settings(max_examples=300)
def test_whoever_comes_finds_what_it_sees(
    wishes: list[Wish], window: int | None, block_size: int, num_blocks: int
) -> None:
    worker = Worker(window, num_blocks, block_size)
    for wish in wishes:
        prompt = [*PROMPT[: wish.num_shared], *range(wish.num_own)]
        # What was generated elsewhere may be the prompt's own continuation.
        so_far = PROMPT[wish.num_shared :][: wish.num_output] if wish.num_own == 1 else []
        prompt = prompt[: len(prompt) - bool(so_far)]
        if prompt:
            worker.run(prompt, wish.route, max_tokens=len(so_far) + 3, output=so_far)


def test_the_same_prompt_finds_all_that_it_may() -> None:
    worker = Worker()
    first = worker.run(PROMPT[:30], Route.RECEIVE)
    assert (first.num_cached, first.window_start) == (0, 20)
    for route in (Route.RECEIVE, Route.LOCAL):
        assert worker.run(PROMPT[:30], route).num_cached == 28


def test_a_shorter_prompt_finds_nothing_where_it_would_see_what_is_missing() -> None:
    worker = Worker()
    worker.run(PROMPT[:30], Route.RECEIVE)
    assert worker.run(PROMPT[:27], Route.LOCAL).num_cached == 0


def test_the_next_turn_finds_prompt_and_answer() -> None:
    worker = Worker()
    first = worker.run(PROMPT[:30], Route.RECEIVE, max_tokens=8)
    turn = [*PROMPT[:30], *first.output, 1, 2, 3]
    second = worker.run(turn, Route.RECEIVE)
    # Of the answer, its last token was never computed: 37 tokens in nine full blocks.
    assert (second.num_cached, second.window_start) == (36, 36)


def test_what_was_received_in_part_is_not_handed_on() -> None:
    worker = Worker()
    worker.run(PROMPT[:30], Route.RECEIVE)
    assert worker.run(PROMPT[:30], Route.HAND_OFF).num_cached == 0
    # That has computed it whole, which is found from now on.
    assert worker.run(PROMPT[:30], Route.HAND_OFF).num_cached == 28
    assert worker.run(PROMPT[:27], Route.LOCAL).num_cached == 24


def test_a_model_without_windows_receives_all() -> None:
    worker = Worker(window=None)
    first = worker.run(PROMPT[:30], Route.RECEIVE)
    assert (first.num_cached, first.window_start) == (0, 0)
    assert worker.run(PROMPT[:30], Route.HAND_OFF).num_cached == 28
