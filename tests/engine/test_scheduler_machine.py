"""In any order of arrivals, steps, transfers and removals no block is lost, nobody starves, nobody gets too much."""

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvbaton.engine.errors import OverloadedError
from kvbaton.engine.output import SampledToken, StepOutput
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase, Request, Route
from kvbaton.engine.sampling import FinishReason, SamplingParams
from kvbaton.engine.scheduler import Batch, Limits, Scheduler, TokenSampled
from support.requests import new_request

EOS = 2
TOKENS = st.lists(st.integers(0, 20), min_size=1, max_size=5)
"""What a model samples, over and over."""


class SchedulerMachine(RuleBasedStateMachine):
    """One worker in the middle of everything; requests of all routes at once."""

    @initialize(
        num_blocks=st.integers(4, 24),
        block_size=st.integers(1, 6),
        prefill=st.integers(1, 12),
        decode=st.integers(1, 4),
        waiting=st.integers(1, 6),
    )
    def make(self, num_blocks: int, block_size: int, prefill: int, decode: int, waiting: int) -> None:
        """Any role and any pool."""
        limits = Limits(max_prefill_tokens=prefill, max_decode_seqs=decode, max_waiting=waiting)
        self.scheduler = Scheduler(BlockPool(num_blocks, block_size), limits, frozenset({EOS}), 1000)
        self.now = 0.0
        self.requests: list[Request] = []
        self.events: dict[Request, list[TokenSampled]] = {}

    def _in(self, *phases: Phase) -> list[Request]:
        return [request for request in self.requests if request.phase in phases]

    @rule(
        num_prompt=st.integers(1, 30),
        max_tokens=st.integers(1, 12),
        route=st.sampled_from(Route),
        ignore_eos=st.booleans(),
    )
    def arrive(self, num_prompt: int, max_tokens: int, route: Route, ignore_eos: bool) -> None:
        """A request comes, and waits, or is refused for one of the two reasons that there are."""
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=ignore_eos)
        try:
            new = new_request(str(len(self.requests)), range(100, 100 + num_prompt), sampling, route)
            request = self.scheduler.add(new, self.now)
        except OverloadedError:
            line_is_full = len(self._in(Phase.WAITING)) == self.scheduler.limits.max_waiting
            kv_tokens = num_prompt + (0 if route is Route.HAND_OFF else max_tokens - 1)
            pool = self.scheduler.pool
            assert line_is_full or kv_tokens > pool.num_blocks * pool.block_size
            return
        self.requests.append(request)
        self.events[request] = []

    @rule(tokens=TOKENS)
    def step(self, tokens: list[int]) -> None:
        """One step of the engine."""
        self.now += 1
        waiting = self._in(Phase.WAITING)
        self.scheduler.make_room(self.now)
        admitted = self.scheduler.admit(self.now)
        assert admitted == waiting[: len(admitted)]
        batch = self.scheduler.schedule(self.now)
        self._check_batch(batch)
        samplers = [piece.request for piece in batch.slices if piece.samples]
        sampled = [SampledToken(token) for token in itertools.islice(itertools.cycle(tokens), len(samplers))]
        events = self.scheduler.commit(batch, StepOutput(sampled), self.now).sampled
        assert [event.request for event in events] == samplers
        for event in events:
            self.events[event.request].append(event)

    def _check_batch(self, batch: Batch) -> None:
        limits = self.scheduler.limits
        decoding, prefilling = self._in(Phase.DECODING), self._in(Phase.PREFILLING)
        kinds = [piece.is_prefill for piece in batch.slices]
        assert kinds == sorted(kinds)
        assert batch.num_decode_tokens == min(len(decoding), limits.max_decode_seqs)
        uncomputed = sum(request.num_uncomputed for request in prefilling)
        assert batch.num_prefill_tokens == min(uncomputed, limits.max_prefill_tokens)
        assert len({piece.request.request_id for piece in batch.slices}) == len(batch.slices)
        for piece in batch.slices:
            assert piece.num_tokens == len(piece.token_ids()) >= 1
            assert piece.start == piece.request.num_computed

    @rule(data=st.data(), tokens=TOKENS)
    def receive(self, data: st.DataObject, tokens: list[int]) -> None:
        """Somebody's KV is there."""
        receiving = self._in(Phase.RECEIVING)
        if receiving:
            self._receive(data.draw(st.sampled_from(receiving)), tokens[0])

    def _receive(self, request: Request, token: int) -> None:
        self.events[request] += self.scheduler.kv_received(request.request_id, token, self.now).sampled

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """A client goes, in whatever phase its request is."""
        alive = [request for request in self.requests if request.phase is not Phase.FINISHED]
        if alive:
            request = data.draw(st.sampled_from(alive))
            assert self.scheduler.remove(request.request_id, self.now) is request

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        """No request has more KV than blocks, and no block has another holder than its request."""
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        for request in self.requests:
            held = len(request.blocks) * self.scheduler.pool.block_size
            assert request.phase is Phase.FINISHED or request.num_computed <= held
            assert request.phase is not Phase.FINISHED or not request.blocks

    @invariant()
    def outputs_are_what_was_told(self) -> None:
        """Events are the output, index by index, within max_tokens, with one reason on the last."""
        for request, events in getattr(self, "events", {}).items():
            assert [event.index for event in events] == list(range(len(events)))
            assert [event.token_id for event in events] == request.output
            assert len(request.output) <= request.sampling.max_tokens
            for event in events:
                assert (event.finish_reason is None) == (event is not events[-1] or request.finish_reason is None)
            if request.finish_reason is FinishReason.LENGTH:
                assert len(request.output) == request.sampling.max_tokens

    def teardown(self) -> None:
        """With nobody new, all that is left ends within as many steps as it has tokens, and all blocks are free."""
        if not hasattr(self, "scheduler"):
            return
        bound = sum(r.num_prompt + r.sampling.max_tokens for r in self.requests) + 1
        for _ in range(bound):
            for request in self._in(Phase.RECEIVING):
                self._receive(request, 5)
            for request in self._in(Phase.HANDING_OFF):
                self.scheduler.remove(request.request_id, self.now)
            if len(self._in(Phase.FINISHED)) == len(self.requests):
                break
            self.step([5])
            self.every_block_is_accounted_for()
            self.outputs_are_what_was_told()
        assert len(self._in(Phase.FINISHED)) == len(self.requests)
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
