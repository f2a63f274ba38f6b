"""Who computes what in the next step: continuous batching with chunked prefill.

Order within a step: running decodes, then prompts, each by priority and then arrival; `chunking` divides the prompt
tokens. A role is two numbers, `max_prefill_tokens` and `max_decode_seqs`: prefill-only, decode-only and every mix are
this one scheduler.

Blocks are taken on demand. Admission takes those of what is to be computed or received, and one token more; decodes
take theirs as they grow. When the pool is out, the decode that ranks last is handed back, blocks and all, to be resumed
from its tokens (docs/adr/0007). Somebody always gets on: the decode that ranks first keeps what it has while there is
another one to hand back, and alone it can have the whole pool; and whoever is handed back has gained a token at least,
since a resumed request samples one before it decodes.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbaton.engine import chunking, new_request, prefix
from kvbaton.engine.budget import ChunkBudget, StepShape
from kvbaton.engine.counters import Counts, EngineCounters
from kvbaton.engine.errors import InvalidArgumentError, OverloadedError, PreemptedError, UnavailableError
from kvbaton.engine.new_request import NewRequest
from kvbaton.engine.output import NOT_A_NUMBER, NOTHING_ALLOWED, SampledToken, StepOutput, no_token_error
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.ranked import RankedRequests
from kvbaton.engine.request import Phase, Request, Route
from kvbaton.engine.result import StepResult, TokenSampled


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one step, and the waiting line, may hold."""

    max_prefill_tokens: int
    """Prompt tokens a step may carry."""
    max_decode_seqs: int
    """Sequences that may decode in a step."""
    max_waiting: int
    """Requests that may wait for blocks."""
    target_itl: float | None = None
    """Seconds that a step which decodes should take, by the choice of how much prompt it carries. None: no target."""

    def refusal(self, route: Route) -> UnavailableError | PreemptedError | None:
        """What ends a request without a place here; None when it has one. What would decode here is handed back."""
        kind = UnavailableError if route is Route.HAND_OFF else PreemptedError
        if route is not Route.RECEIVE and not self.max_prefill_tokens:
            return kind("this worker computes no prompts at present")
        if route is not Route.HAND_OFF and not self.max_decode_seqs:
            return kind("this worker does not decode at present")
        return None


# The two that follow are made by the hundred in every step: frozen ones would cost several times as much.


@dataclass(slots=True)
class Slice:
    """Tokens `[start, start + num_tokens)` of one request, to be computed in one step."""

    request: Request
    start: int
    num_tokens: int
    samples: bool
    """Whether the last token's logits choose the next token."""

    @property
    def is_prefill(self) -> bool:
        """Whether these tokens come before the first new one."""
        return self.request.phase is Phase.PREFILLING

    def token_ids(self) -> Sequence[int]:
        """The tokens to feed."""
        return self.request.token_ids(self.start, self.start + self.num_tokens)


@dataclass(slots=True)
class Batch:
    """One step's work, decodes first. An empty batch means that there is nothing to compute."""

    slices: list[Slice]

    def __bool__(self) -> bool:
        return bool(self.slices)

    @property
    def num_decode_tokens(self) -> int:
        """Sequences that decode in the step."""
        prompts = itertools.takewhile(lambda piece: piece.is_prefill, reversed(self.slices))
        return len(self.slices) - sum(1 for _ in prompts)

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens in the step."""
        return sum(piece.num_tokens for piece in self.slices[self.num_decode_tokens :])


@dataclass(slots=True)
class Scheduler:
    """All requests of one worker, and the rules by which they proceed."""

    pool: BlockPool
    limits: Limits
    eos_token_ids: frozenset[int]
    max_model_len: int
    window: int | None = None
    """The largest sliding window of the model's layers; None without one."""
    counters: EngineCounters = field(default_factory=EngineCounters)
    chunk_budget: ChunkBudget = field(default_factory=ChunkBudget)
    """Asked when the limits have a target; whoever measures steps tells it of them."""
    _requests: dict[str, Request] = field(default_factory=dict)
    _waiting: RankedRequests = field(default_factory=RankedRequests)
    _receiving: RankedRequests = field(default_factory=RankedRequests)
    _prefilling: RankedRequests = field(default_factory=RankedRequests)
    _decoding: RankedRequests = field(default_factory=RankedRequests)
    _num_growing: int = 0
    _arrivals: "itertools.count[int]" = field(default_factory=itertools.count)

    def add(self, new: NewRequest, now: float) -> Request:
        """Put a request in the waiting line, after those of its priority.

        Raises InvalidArgumentError for an id in use, an empty prompt, one beyond the context, or an answer that is
        complete already, what `Limits.refusal` says, and OverloadedError when the line is full or the request could
        never fit the pool.
        """
        if new.request_id in self._requests:
            raise InvalidArgumentError("request_id", f"{new.request_id!r} is already running here")
        new_request.check(new, self.max_model_len)
        if (refusal := self.limits.refusal(new.route)) is not None:
            raise refusal
        request = new_request.begin(new, next(self._arrivals), now)
        needed = self.pool.blocks_for(request.max_kv_tokens)
        if needed > self.pool.num_blocks:
            fields = "prompt" if request.route is Route.HAND_OFF else "prompt and max_tokens"
            need = f"{fields}: {request.max_kv_tokens} tokens need {needed} KV blocks"
            raise OverloadedError(f"{need}, the whole pool has {self.pool.num_blocks}")
        if len(self._waiting) >= self.limits.max_waiting:
            raise OverloadedError(f"{len(self._waiting)} requests are waiting already")
        self._requests[request.request_id] = request
        self._waiting.add(request)
        return request

    def set_limits(self, limits: Limits, now: float) -> StepResult:
        """Other limits from the next step on. Requests that wait already stay, even beyond a shorter line.

        What has no place any more fails as `Limits.refusal` says; what decodes is handed back by the next `make_room`.
        """
        self.limits = limits
        result = StepResult()
        for request in [*self._waiting, *self._prefilling]:
            if (refusal := limits.refusal(request.route)) is not None:
                self.fail(request, now)
                result.failed.append((request, refusal))
        return result

    def make_room(self, now: float) -> list[Request]:
        """Give each sequence that is to decode a block for its next token; return those handed back for that.

        A worker that does not decode any more hands all of them back.
        """
        if not self.limits.max_decode_seqs:
            displaced = [*self._decoding]
            for request in displaced:
                self._finish(request, now)
            return displaced
        preempted: list[Request] = []
        size = self.pool.block_size
        for request in list(itertools.islice(self._decoding, self.limits.max_decode_seqs)):
            # One that was handed back a moment ago has no blocks, and computed tokens: it asks for nothing.
            if request.num_computed == len(request.blocks) * size:
                while not self.pool.can_allocate(1):
                    last = self._decoding[-1]
                    self._finish(last, now)
                    preempted.append(last)
                    if last is request:
                        break
                else:
                    request.blocks += self.pool.allocate(1)
                    self._num_growing -= not self._may_grow(request)
        self.counters.requests_preempted += len(preempted)
        return preempted

    def admit(self, now: float) -> list[Request]:
        """Give blocks to waiting requests, in order, while there are enough; return those admitted.

        A block for each request that may need another one stays free: an admission that makes somebody be handed back
        in the next step is work for nothing.
        """
        admitted: list[Request] = []
        while self._waiting:
            request = self._waiting[0]
            cached = prefix.match(self.pool, request, self.window, hurried=bool(self._decoding))
            if cached is None:
                break
            needed = self.pool.blocks_for(min(request.num_prefill + 1, request.max_kv_tokens)) - len(cached)
            if not self.pool.can_allocate(needed + self._num_growing, reusing=cached):
                break
            self._waiting.discard(request)
            prefix.begin(self.pool, request, self.window, cached, needed)
            request.milestones.admitted = now
            if request.uses_prefix_cache:
                self.counters.prefix_tokens_queried += request.num_prefill
                self.counters.prefix_tokens_hit += request.num_cached
            self._num_growing += self._may_grow(request)
            if request.route is Route.RECEIVE:
                request.move_to(Phase.RECEIVING)
                self._receiving.add(request)
            else:
                request.move_to(Phase.PREFILLING)
                self._prefilling.add(request)
            admitted.append(request)
        if self._decoding:
            prefix.hash_ahead(self.pool, self._receiving)
        return admitted

    def schedule(self, now: float) -> Batch:
        """Choose the next step's work, after `make_room`. Sets the milestones of what starts here, and nothing else."""
        slices: list[Slice] = []
        for request in itertools.islice(self._decoding, self.limits.max_decode_seqs):
            if request.milestones.decode_started is None:
                request.milestones.decode_started = now
            slices.append(Slice(request, request.num_computed, 1, True))
        for request, num_tokens in chunking.share(self._prefilling, self._prefill_budget(slices)):
            if request.milestones.prefill_started is None:
                request.milestones.prefill_started = now
            last = num_tokens == request.num_uncomputed
            slices.append(Slice(request, request.num_computed, num_tokens, samples=last))
        return Batch(slices)

    def commit(self, batch: Batch, output: StepOutput, now: float) -> StepResult:
        """Record a computed step. `output` has one token for each slice that samples, in the batch's order."""
        num_samples = sum(piece.samples for piece in batch.slices)
        assert len(output.sampled) == num_samples, f"{len(output.sampled)} tokens for {num_samples} slices that sample"
        sampled = iter(output.sampled)
        result = StepResult()
        for piece in batch.slices:
            request = piece.request
            token = next(sampled) if piece.samples else None
            if token is not None and token.token_id in (NOT_A_NUMBER, NOTHING_ALLOWED):
                self._no_token(request, token.token_id, result, now)
                continue
            request.num_computed += piece.num_tokens
            prefix.register(self.pool, request)
            logprobs = output.prompt_logprobs.get(request.request_id)
            if logprobs is not None:
                result.prompt_logprobs.append((request, logprobs))
            if token is not None:
                self._append(request, token, result, now)
        return result

    def kv_received(self, request_id: str, first_token_id: int, now: float) -> StepResult:
        """The KV is in place and verified: record the first token and let the request decode."""
        request = self._requests[request_id]
        assert request.phase is Phase.RECEIVING, f"{request_id} does not wait for KV"
        request.num_computed = request.num_prefill
        request.milestones.kv_ready = now
        prefix.register(self.pool, request)
        result = StepResult()
        self._append(request, SampledToken(first_token_id), result, now)
        return result

    def remove(self, request_id: str, now: float) -> Request | None:
        """End a request in whatever phase it is and free its blocks; None when there is no such request."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, now)
        return request

    def fail(self, request: Request, now: float) -> None:
        """A request's step failed: it computes no more. Its blocks stay with it while a transfer may read from them."""
        if request.phase is Phase.PREFILLING and request.route is Route.HAND_OFF:
            self._prefilling.discard(request)
            request.move_to(Phase.HANDING_OFF)
        else:
            self._finish(request, now)

    def counts(self) -> Counts:
        """How many requests stand in each phase."""
        counts = Counts()
        for request in self._requests.values():
            setattr(counts, request.phase.value, getattr(counts, request.phase.value) + 1)
        return counts

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is free or held by exactly the requests that list it."""
        self.pool.check_integrity([request.blocks for request in self._requests.values()])
        for request in self._requests.values():
            assert (request.phase is Phase.WAITING) == (not request.blocks), f"{request.request_id} in {request.phase}"
        growing = [request for request in self._requests.values() if request.blocks and self._may_grow(request)]
        assert len(growing) == self._num_growing, f"{self._num_growing} requests grow, not {len(growing)}"

    def _prefill_budget(self, decodes: Sequence[Slice]) -> int:
        limits = self.limits
        if limits.target_itl is None or not decodes or not self._prefilling:
            return limits.max_prefill_tokens
        shape = StepShape(len(decodes), sum(piece.start + 1 for piece in decodes))
        start = self._prefilling[0].num_computed
        return self.chunk_budget.choose(limits.target_itl, shape, start, limits.max_prefill_tokens)

    def _may_grow(self, request: Request) -> bool:
        return len(request.blocks) < self.pool.blocks_for(request.max_kv_tokens)

    def _append(self, request: Request, token: SampledToken, result: StepResult, now: float) -> None:
        if request.phase is Phase.PREFILLING:
            request.milestones.prefill_ended = now
        if request.constraint is not None:
            try:
                request.constraint.accept(token.token_id)
            except Exception as error:
                self.fail(request, now)
                result.failed.append((request, error))
                return
        request.output.append(token.token_id)
        request.finish_reason = reason = request.reason_to_end(self.eos_token_ids)
        if request.route is Route.HAND_OFF:
            # Its blocks are read until the KV has left, whatever the token was: `remove` ends it.
            self._prefilling.discard(request)
            request.move_to(Phase.HANDING_OFF)
        elif reason is not None:
            self._finish(request, now)
        elif request.phase is not Phase.DECODING:
            self._receiving.discard(request)
            self._prefilling.discard(request)
            request.move_to(Phase.DECODING)
            self._decoding.add(request)
        result.sampled.append(TokenSampled(request, len(request.output) - 1, token.token_id, reason, token.logprobs))

    def _no_token(self, request: Request, why: int, result: StepResult, now: float) -> None:
        if why == NOT_A_NUMBER:
            # What made these logits may be in any of its blocks, and must not reach others by the cache.
            self.pool.forget(request.blocks)
            self.counters.requests_not_a_number += 1
        self.fail(request, now)
        result.failed.append((request, no_token_error(why, len(request.output), request.constraint is not None)))

    def _finish(self, request: Request, now: float) -> None:
        if request.phase is Phase.WAITING:
            self._waiting.discard(request)
        else:
            self._num_growing -= self._may_grow(request)
        for requests in (self._receiving, self._prefilling, self._decoding):
            requests.discard(request)
        del self._requests[request.request_id]
        self.pool.release(request.blocks)
        request.blocks = []
        request.milestones.finished = now
        request.move_to(Phase.FINISHED)
