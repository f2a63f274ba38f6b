"""Who computes what in the next step: continuous batching with chunked prefill.

Order within a step: running decodes, then prompts already begun, then new ones, each in order of arrival. A role is two
numbers, `max_prefill_tokens` and `max_decode_seqs`: prefill-only, decode-only and every mix are this one scheduler.
Admission takes the blocks for a request's whole life, so that a running request can never run out (docs/adr/0003).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbaton.engine.errors import InvalidArgumentError, OverloadedError
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Milestones, Phase, Request, Route
from kvbaton.engine.sampling import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one step, and the waiting line, may hold."""

    max_prefill_tokens: int
    """Prompt tokens a step may carry."""
    max_decode_seqs: int
    """Sequences that may decode in a step."""
    max_waiting: int
    """Requests that may wait for blocks."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens `[start, start + num_tokens)` of one request, to be computed in one step."""

    request: Request
    start: int
    num_tokens: int
    samples: bool
    """Whether the last token's logits choose the next token."""

    @property
    def is_prefill(self) -> bool:
        """Whether these are prompt tokens."""
        return self.request.phase is Phase.PREFILLING

    def token_ids(self) -> Sequence[int]:
        """The tokens to feed."""
        if self.is_prefill:
            return self.request.prompt[self.start : self.start + self.num_tokens]
        return self.request.output[-1:]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. An empty batch means that there is nothing to compute."""

    slices: list[Slice]

    def __bool__(self) -> bool:
        return bool(self.slices)

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens in the step."""
        return sum(s.num_tokens for s in self.slices if s.is_prefill)

    @property
    def num_decode_tokens(self) -> int:
        """Sequences that decode in the step."""
        return sum(1 for s in self.slices if not s.is_prefill)


@dataclass(frozen=True, slots=True)
class TokenSampled:
    """Token `index` of a request's output; `finish_reason` is set on the last."""

    request: Request
    index: int
    token_id: int
    finish_reason: FinishReason | None


@dataclass(slots=True)
class Counts:
    """How many requests stand in each phase."""

    waiting: int = 0
    receiving: int = 0
    prefilling: int = 0
    handing_off: int = 0
    decoding: int = 0


@dataclass(slots=True)
class Scheduler:
    """All requests of one worker, and the rules by which they proceed."""

    pool: BlockPool
    limits: Limits
    eos_token_ids: frozenset[int]
    max_model_len: int
    _requests: dict[str, Request] = field(default_factory=dict)
    _waiting: deque[Request] = field(default_factory=deque)
    _prefilling: dict[str, Request] = field(default_factory=dict)
    _decoding: dict[str, Request] = field(default_factory=dict)

    def add(
        self, request_id: str, prompt: Sequence[int], sampling: SamplingParams, route: Route, now: float
    ) -> Request:
        """Put a request at the end of the waiting line.

        Raises InvalidArgumentError for an id in use, an empty prompt or one beyond the context, and OverloadedError
        when the line is full or the request could never fit the pool.
        """
        request = Request(request_id, prompt, sampling, route, Milestones(arrived=now))
        if request_id in self._requests:
            raise InvalidArgumentError("request_id", f"{request_id!r} is already running here")
        if not prompt:
            raise InvalidArgumentError("prompt", "is empty")
        if request.num_prompt + sampling.max_tokens > self.max_model_len:
            total = f"{request.num_prompt} tokens and max_tokens {sampling.max_tokens}"
            raise InvalidArgumentError("prompt", f"{total} exceed the context of {self.max_model_len}")
        needed = self.pool.blocks_for(request.max_kv_tokens)
        if needed > self.pool.num_blocks:
            raise OverloadedError(f"the request needs {needed} KV blocks, the whole pool has {self.pool.num_blocks}")
        if len(self._waiting) >= self.limits.max_waiting:
            raise OverloadedError(f"{len(self._waiting)} requests are waiting already")
        self._requests[request_id] = request
        self._waiting.append(request)
        return request

    def admit(self, now: float) -> list[Request]:
        """Give blocks to waiting requests, in order, while there are enough; return those admitted."""
        admitted: list[Request] = []
        while self._waiting:
            request = self._waiting[0]
            needed = self.pool.blocks_for(request.max_kv_tokens)
            if not self.pool.can_allocate(needed):
                break
            self._waiting.popleft()
            request.blocks = self.pool.allocate(needed)
            request.milestones.admitted = now
            if request.route is Route.RECEIVE:
                request.move_to(Phase.RECEIVING)
            else:
                request.move_to(Phase.PREFILLING)
                self._prefilling[request.request_id] = request
            admitted.append(request)
        return admitted

    def schedule(self, now: float) -> Batch:
        """Choose the next step's work. Sets the milestones of requests that start here; changes nothing else."""
        slices: list[Slice] = []
        for request in self._decoding.values():
            if len(slices) == self.limits.max_decode_seqs:
                break
            if request.milestones.decode_started is None:
                request.milestones.decode_started = now
            slices.append(Slice(request, request.num_computed, 1, samples=True))
        budget = self.limits.max_prefill_tokens
        for request in self._prefilling.values():
            if budget == 0:
                break
            num_tokens = min(budget, request.num_uncomputed_prompt)
            budget -= num_tokens
            if request.milestones.prefill_started is None:
                request.milestones.prefill_started = now
            last = num_tokens == request.num_uncomputed_prompt
            slices.append(Slice(request, request.num_computed, num_tokens, samples=last))
        return Batch(slices)

    def commit(self, batch: Batch, token_ids: Sequence[int], now: float) -> list[TokenSampled]:
        """Record a computed step. `token_ids` has one token for each slice that samples, in the batch's order."""
        num_samples = sum(piece.samples for piece in batch.slices)
        assert len(token_ids) == num_samples, f"{len(token_ids)} tokens for {num_samples} slices that sample"
        sampled = iter(token_ids)
        events: list[TokenSampled] = []
        for piece in batch.slices:
            request = piece.request
            request.num_computed += piece.num_tokens
            if piece.samples:
                events.append(self._append(request, next(sampled), now))
        return events

    def kv_received(self, request_id: str, first_token_id: int, now: float) -> TokenSampled:
        """The prompt's KV is in place and verified: record the first token and let the request decode."""
        request = self._requests[request_id]
        assert request.phase is Phase.RECEIVING, f"{request_id} does not wait for KV"
        request.num_computed = request.num_prompt
        request.milestones.kv_ready = now
        return self._append(request, first_token_id, now)

    def remove(self, request_id: str, now: float) -> Request | None:
        """End a request in whatever phase it is and free its blocks; None when there is no such request."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, now)
        return request

    def fail(self, request_id: str, now: float) -> None:
        """A request's step failed: it computes no more. Its blocks stay with it while a transfer may read from them."""
        request = self._requests[request_id]
        if request.route is Route.HAND_OFF:
            del self._prefilling[request_id]
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

    def _append(self, request: Request, token_id: int, now: float) -> TokenSampled:
        request.output.append(token_id)
        reason = self._finish_reason(request, token_id)
        index = len(request.output) - 1
        if request.phase is Phase.PREFILLING:
            request.milestones.prefill_ended = now
        if request.route is Route.HAND_OFF:
            # Its blocks are read until the KV has left, whatever the token was: `remove` ends it.
            del self._prefilling[request.request_id]
            request.finish_reason = reason
            request.move_to(Phase.HANDING_OFF)
        elif reason is not None:
            request.finish_reason = reason
            self._finish(request, now)
        elif request.phase is not Phase.DECODING:
            self._prefilling.pop(request.request_id, None)
            request.move_to(Phase.DECODING)
            self._decoding[request.request_id] = request
        return TokenSampled(request, index, token_id, reason)

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        sampling = request.sampling
        if token_id in sampling.stop_token_ids:
            return FinishReason.STOP
        if token_id in self.eos_token_ids and not sampling.ignore_eos:
            return FinishReason.STOP
        if len(request.output) >= sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def _finish(self, request: Request, now: float) -> None:
        if request.phase is Phase.WAITING:
            self._waiting.remove(request)
        self._prefilling.pop(request.request_id, None)
        self._decoding.pop(request.request_id, None)
        del self._requests[request.request_id]
        self.pool.release(request.blocks)
        request.blocks = []
        request.milestones.finished = now
        request.move_to(Phase.FINISHED)
