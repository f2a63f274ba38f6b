"""In any order of arrivals, steps, transfers, failures, removals, hand-backs and changes of limits no block is lost,
nobody starves, and every answer is the one that its own tokens give: what the model sees is what is written in blocks,
so a block that was found, shared, kept or overwritten wrongly would change it. The model has a layer that sees all
tokens and one that may see a window, of which received KV brings no more than it must.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbaton.engine.errors import OverloadedError, PreemptedError, UnavailableError
from kvbaton.engine.output import NOT_A_NUMBER, SampledToken, StepOutput
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase, Request, Route
from kvbaton.engine.result import StepResult
from kvbaton.engine.sampling import FinishReason, SamplingParams
from kvbaton.engine.scheduler import Batch, Limits, Scheduler
from support.requests import new_request

EOS = 2
PROMPT = [10, 10, 10, 11, 10, 10, 10, 11, 10, 10, 10, 10]
"""What prompts begin with: blocks that are alike by themselves are not so with what comes before them."""


def kv_of(before: int, token: int) -> int:
    """The model's KV at a position: a function of that before it, and so of all tokens up to its own."""
    return (before * 31 + token + 1) % 1_000_003


def token_after(kv: Sequence[int], windowed: Sequence[int]) -> int:
    """The token that the model samples: a function of all KV that its layers see, and now and then EOS."""
    state = 0
    for value in itertools.chain(kv, windowed):
        state = kv_of(state, value)
    return EOS if state % 23 == 0 else 3 + state % 97


def all_kv(tokens: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(tokens, kv_of, initial=0))[1:]


def next_token(tokens: Sequence[int], window: int | None) -> int:
    kv = all_kv(tokens)
    return token_after(kv, kv[-(window or len(kv)) :])


def expected(prompt: Sequence[int], sampling: SamplingParams, window: int | None) -> list[int]:
    output: list[int] = []
    while len(output) < sampling.max_tokens and (not output or sampling.ignore_eos or output[-1] != EOS):
        output.append(next_token([*prompt, *output], window))
    return output


@dataclass(eq=False)
class Asked:
    """What a client wants, in however many requests."""

    prompt: list[int]
    sampling: SamplingParams
    salt: str
    request: Request
    failed: bool = False
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Wish:
    """A request to come."""

    num_shared: int
    own: list[int]
    max_tokens: int
    route: Route
    ignore_eos: bool
    salt: str
    priority: int


WISHES = st.builds(
    Wish,
    num_shared=st.integers(1, len(PROMPT)),
    own=st.lists(st.integers(8, 9), max_size=2),
    max_tokens=st.sampled_from([1, 4, 16, 16]),
    route=st.sampled_from([Route.LOCAL, Route.LOCAL, Route.LOCAL, Route.RECEIVE, Route.HAND_OFF]),
    ignore_eos=st.sampled_from([True, True, True, False]),
    salt=st.sampled_from(["", "", "", "salt"]),
    priority=st.integers(0, 2),
)


class SchedulerMachine(RuleBasedStateMachine):
    """One worker in the middle of everything; requests of all routes at once."""

    @initialize(
        num_blocks=st.integers(8, 12),
        block_size=st.integers(1, 4),
        waiting=st.integers(2, 6),
        window=st.none() | st.integers(1, 9),
    )
    def make(self, num_blocks: int, block_size: int, waiting: int, window: int | None) -> None:
        """Any pool, with nothing in it."""
        limits = Limits(max_prefill_tokens=20, max_decode_seqs=8, max_waiting=waiting)
        self.scheduler = Scheduler(BlockPool(num_blocks, block_size), limits, frozenset({EOS}), 1000, window)
        # By layer: that of all tokens, and the other one.
        self.memory = [[[-1] * block_size for _ in range(num_blocks)] for _ in range(2)]
        self.now = 0.0
        self.asked: list[Asked] = []
        self.handed_back: list[Asked] = []

    def _in(self, *phases: Phase) -> list[Asked]:
        return [asked for asked in self.asked if asked.request.phase in phases]

    def _of(self, request: Request) -> Asked:
        return next(asked for asked in self.asked if asked.request is request)

    @rule(wishes=st.lists(WISHES, min_size=2, max_size=5))
    def arrive(self, wishes: list[Wish]) -> None:
        """Requests come, and wait, or are refused for one of the three reasons that there are."""
        for wish in wishes:
            prompt = PROMPT[: wish.num_shared] + wish.own
            sampling = SamplingParams(max_tokens=wish.max_tokens, seed=0, ignore_eos=wish.ignore_eos)
            more = {"cache_salt": wish.salt, "priority": wish.priority}
            new = new_request(str(len(self.asked)), prompt, sampling, wish.route, **more)
            try:
                request = self.scheduler.add(new, self.now)
            except (UnavailableError, PreemptedError):
                assert self.scheduler.limits.refusal(wish.route) is not None
            except OverloadedError:
                line_is_full = len(self._in(Phase.WAITING)) >= self.scheduler.limits.max_waiting
                kv_tokens = len(prompt) + (0 if wish.route is Route.HAND_OFF else wish.max_tokens - 1)
                pool = self.scheduler.pool
                assert line_is_full or kv_tokens > pool.num_blocks * pool.block_size
            else:
                self.asked.append(Asked(prompt, sampling, wish.salt, request))

    @precondition(lambda self: self.handed_back)
    @rule()
    def resume(self) -> None:
        """The router sends back what was handed back, with the tokens that it has."""
        asked = self.handed_back.pop(0)
        before = asked.request
        more = {"output": asked.answer, "cache_salt": asked.salt, "priority": before.priority}
        new = new_request(before.request_id, asked.prompt, asked.sampling, before.route, **more)
        try:
            asked.request = self.scheduler.add(new, self.now)
        except (OverloadedError, PreemptedError):
            limits = self.scheduler.limits
            assert limits.refusal(before.route) or len(self._in(Phase.WAITING)) >= limits.max_waiting
            self.handed_back.append(asked)

    @rule(prefill=st.sampled_from([0, 1, 5, 40]), decode=st.sampled_from([0, 2, 8, 8]), waiting=st.integers(2, 6))
    def change_limits(self, prefill: int, decode: int, waiting: int) -> None:
        """An operator gives the worker another role."""
        limits = Limits(max_prefill_tokens=prefill, max_decode_seqs=decode, max_waiting=waiting)
        for request, _ in self.scheduler.set_limits(limits, self.now).failed:
            assert limits.refusal(request.route) is not None
            self._of(request).failed = True

    @rule(times=st.integers(1, 10))
    def step(self, times: int) -> None:
        """Some steps of the engine."""
        for _ in range(times):
            batch = self._begin_step()
            self._record(self.scheduler.commit(batch, StepOutput(self._compute(batch)), self.now))
            self.every_block_is_accounted_for()

    @rule(raises=st.booleans())
    def step_that_fails(self, raises: bool) -> None:
        """A forward pass that raises after it has written its KV, or one of which the first logits are not numbers."""
        batch = self._begin_step()
        sampled = self._compute(batch)
        if raises:
            for piece in batch.slices:
                self.scheduler.fail(piece.request, self.now)
                self._of(piece.request).failed = True
        else:
            sampled[:1] = [SampledToken(NOT_A_NUMBER)] * len(sampled[:1])
            self._record(self.scheduler.commit(batch, StepOutput(sampled), self.now))

    def _begin_step(self) -> Batch:
        self.now += 1
        decoding = sorted(self._in(Phase.DECODING), key=lambda asked: asked.request.rank)
        preempted = self.scheduler.make_room(self.now)
        last = decoding[len(decoding) - len(preempted) :]
        assert set(preempted) == {asked.request for asked in last}
        assert len(preempted) == len(decoding) or self.scheduler.limits.max_decode_seqs
        self.handed_back += [self._of(request) for request in preempted]
        waiting = sorted(self._in(Phase.WAITING), key=lambda asked: asked.request.rank)
        admitted = self.scheduler.admit(self.now)
        assert admitted == [asked.request for asked in waiting[: len(admitted)]]
        for request in admitted:
            assert self._seen(request, request.num_cached) == all_kv(request.token_ids(0, request.num_cached))
            self._windowed(request, request.num_cached + 1)
            assert request.num_cached < request.num_prefill
        batch = self.scheduler.schedule(self.now)
        self._check_batch(batch)
        return batch

    def _check_batch(self, batch: Batch) -> None:
        limits = self.scheduler.limits
        kinds = [piece.is_prefill for piece in batch.slices]
        assert kinds == sorted(kinds)
        assert batch.num_decode_tokens == min(len(self._in(Phase.DECODING)), limits.max_decode_seqs)
        uncomputed = sum(asked.request.num_uncomputed for asked in self._in(Phase.PREFILLING))
        assert batch.num_prefill_tokens == min(uncomputed, limits.max_prefill_tokens)
        assert len({piece.request.request_id for piece in batch.slices}) == len(batch.slices)
        for piece in batch.slices:
            assert piece.num_tokens == len(piece.token_ids()) >= 1
            assert piece.start == piece.request.num_computed

    def _compute(self, batch: Batch) -> list[SampledToken]:
        for piece in batch.slices:
            self._write(piece.request, piece.start, piece.token_ids())
        return [
            SampledToken(token_after(self._seen(piece.request, stop), self._windowed(piece.request, stop)))
            for piece in batch.slices
            if piece.samples
            for stop in [piece.start + piece.num_tokens]
        ]

    def _write(self, request: Request, start: int, token_ids: Sequence[int], window_start: int = 0) -> None:
        size = self.scheduler.pool.block_size
        for position, token in enumerate(token_ids, start):
            block = request.blocks[position // size]
            holders = [asked for asked in self.asked if block in asked.request.blocks]
            assert len(holders) == 1, "somebody else looks at this block"
            before = self._seen(request, position)[-1] if position else 0
            kv = kv_of(before, token)
            self.memory[0][block][position % size] = kv
            self.memory[1][block][position % size] = kv if position >= window_start else -1

    def _seen(self, request: Request, stop: int, layer: int = 0) -> list[int]:
        size, memory = self.scheduler.pool.block_size, self.memory[layer]
        return [memory[request.blocks[position // size]][position % size] for position in range(stop)]

    def _windowed(self, request: Request, stop: int) -> list[int]:
        """What the token before `stop`, perhaps not yet computed, sees in the other layer."""
        low = max(0, stop - (self.scheduler.window or stop))
        kv = self._seen(request, min(stop, len(request.blocks) * self.scheduler.pool.block_size), layer=1)
        # Kernels read whole blocks, and what they mask must be there too.
        whole = low - low % self.scheduler.pool.block_size
        assert kv[whole : stop - 1] == self._seen(request, stop - 1)[whole:]
        return kv[low:]

    def _record(self, result: StepResult) -> None:
        for event in result.sampled:
            asked = self._of(event.request)
            assert event.index == len(asked.answer)
            asked.answer.append(event.token_id)
            assert event.finish_reason is event.request.finish_reason
        for request, _ in result.failed:
            self._of(request).failed = True

    @precondition(lambda self: self._in(Phase.RECEIVING))
    @rule(newest=st.booleans())
    def receive(self, newest: bool) -> None:
        """Somebody's KV is there."""
        self._receive(self._in(Phase.RECEIVING)[-newest])

    def _receive(self, asked: Asked) -> None:
        request = asked.request
        tokens = [*asked.prompt, *asked.answer]
        self._write(request, request.num_cached, tokens[request.num_cached :], request.window_start)
        first = next_token(tokens, self.scheduler.window)
        self._record(self.scheduler.kv_received(request.request_id, first, self.now))

    @precondition(lambda self: self._in(Phase.HANDING_OFF))
    @rule()
    def hand_off(self) -> None:
        """KV has left."""
        for asked in self._in(Phase.HANDING_OFF):
            self._hand_off(asked)

    def _hand_off(self, asked: Asked) -> None:
        if not asked.failed:
            for layer in range(2):
                assert self._seen(asked.request, asked.request.num_prefill, layer) == all_kv(asked.prompt)
        assert self.scheduler.remove(asked.request.request_id, self.now) is asked.request

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A client goes, in whatever phase its request is."""
        alive = self._in(*set(Phase) - {Phase.FINISHED})
        if alive:
            asked = data.draw(st.sampled_from(alive))
            assert self.scheduler.remove(asked.request.request_id, self.now) is asked.request

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        """No block has another holder than those who list it, and nobody has more KV than blocks."""
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        for asked in self.asked:
            request = asked.request
            held = len(request.blocks) * self.scheduler.pool.block_size
            assert request.phase is Phase.FINISHED or request.num_computed <= held

    @invariant()
    def answers_are_what_the_tokens_give(self) -> None:
        """What a client has is the beginning of the right answer, and all of it when it has ended."""
        for asked in getattr(self, "asked", []):
            right = expected(asked.prompt, asked.sampling, self.scheduler.window)
            assert asked.answer == right[: len(asked.answer)]
            reason = asked.request.finish_reason
            if reason is not None:
                assert asked.request.route is Route.HAND_OFF or asked.answer == right
                stopped = right[-1] == EOS and not asked.sampling.ignore_eos
                assert reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)

    def teardown(self) -> None:
        """With nobody new, all that is left ends within as many steps as it has tokens, and all blocks are free."""
        if not hasattr(self, "scheduler"):
            return
        self.change_limits(prefill=2, decode=3, waiting=100)
        # Whoever is handed back has gained a token, and computes at most all of its tokens again.
        bound = 1 + sum((len(asked.prompt) + 16) * 17 for asked in self.asked)
        for _ in range(bound):
            for asked in self._in(Phase.RECEIVING):
                self._receive(asked)
            for asked in self._in(Phase.HANDING_OFF):
                self._hand_off(asked)
            while self.handed_back:
                self.resume()
            if len(self._in(Phase.FINISHED)) == len(self.asked):
                break
            self.step(1)
            self.answers_are_what_the_tokens_give()
        assert len(self._in(Phase.FINISHED)) == len(self.asked)
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
