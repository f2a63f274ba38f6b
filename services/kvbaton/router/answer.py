"""One answer, over as many attempts as it takes: a request can go on anywhere from its tokens."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kvbaton.engine.errors import UnavailableError
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.tokens import pack_token_ids
from kvbaton.router.admission import AdmittedRequest
from kvbaton.router.attempt import Attempt, Job
from kvbaton.router.registry import Placement
from kvbaton.router.resume import ResumeBudget
from kvbaton.rpc.sampling import sampling_to_proto
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types

Emit = Callable[[pb.GenerateResponse], Awaitable[None]]
"""Passes an event on to the client."""


@dataclass(slots=True)
class Answer:
    """Sequence `number` of a request, as far as it has come."""

    request: AdmittedRequest
    number: int
    sampling: SamplingParams
    choose: Callable[[], Placement]
    """Where to go on. Raises UnavailableError when nowhere."""
    emit: Emit
    token_ids: list[int] = field(default_factory=list)
    finish_reason: types.FinishReason = types.FINISH_REASON_UNSPECIFIED
    num_resumes: int = 0
    cached_tokens: int = 0
    """Prompt tokens found in a prefix cache, at the attempt that began the answer."""
    timings: types.Timings = field(default_factory=types.Timings)
    """The workers' part of them, over all attempts."""
    placement: Placement | None = None
    """Of the last attempt."""
    prefix_ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the first attempt's workers have the prompt's KV in their caches, or when that attempt has ended."""
    _budget: ResumeBudget = field(default_factory=ResumeBudget)

    async def run(self, placement: Placement, num_uncached: int, deadline: float | None) -> None:
        """Generate to the last token, first at `placement`, where `num_uncached` tokens of the prompt are unknown.

        `deadline` is of `time.monotonic`. Raises the errors of the table, some within ExceptionGroups: OverloadedError
        when the answer is handed back too often, UnavailableError when a worker was lost.
        """
        while True:
            attempt = Attempt(self._job(num_uncached, deadline), placement, self)
            self.placement = placement
            num_before = len(self.token_ids)
            await attempt.run()
            self.prefix_ready.set()
            if not num_before:
                self.cached_tokens = attempt.cached_tokens
            add_timings(self.timings, attempt.timings)
            if self.finish_reason:
                return
            if not attempt.preempted:
                raise UnavailableError(f"decode worker {placement.decode.address} finished before the last token")
            self.num_resumes += 1
            await asyncio.sleep(self._budget.wait_after(len(self.token_ids) - num_before))
            placement = self.choose()
            num_uncached = len(self.request.prompt) + len(self.token_ids)

    async def on_tokens(self, tokens: types.TokenEvent) -> None:
        """Pass tokens on; each index goes to the client once, in order."""
        if tokens.first_index != len(self.token_ids) or self.finish_reason:
            next_index = "none" if self.finish_reason else len(self.token_ids)
            raise UnavailableError(f"token {tokens.first_index} came where {next_index} was next")
        self.token_ids.extend(tokens.token_ids)
        self.finish_reason = tokens.finish_reason
        tokens.sequence = self.number
        await self.emit(pb.GenerateResponse(tokens=tokens))

    async def on_prompt_logprobs(self, logprobs: types.PromptLogprobs) -> None:
        """Pass them on, where they were asked for."""
        if self._wants_prompt_logprobs:
            await self.emit(pb.GenerateResponse(prompt_logprobs=logprobs))

    def on_prefix_ready(self) -> None:
        """Let the request's other answers start."""
        self.prefix_ready.set()

    @property
    def _wants_prompt_logprobs(self) -> bool:
        """They come once: with the first answer, before its first token."""
        return self.number == 0 and not self.token_ids

    def _job(self, num_uncached: int, deadline: float | None) -> Job:
        sampling = sampling_to_proto(self.sampling)
        if not self._wants_prompt_logprobs:
            sampling.ClearField("prompt_logprobs")
        request = self.request
        return Job(
            request_id=f"{request.request_id}#{self.number}" if self.number else request.request_id,
            prompt_token_ids=pack_token_ids(request.prompt),
            output_token_ids=pack_token_ids(self.token_ids),
            sampling=sampling,
            priority=request.priority,
            cache_salt=request.cache_salt,
            num_uncached=num_uncached,
            deadline=deadline,
        )


def add_timings(total: types.Timings, part: types.Timings) -> None:
    """Add one attempt's durations, and what its hand-off moved, to an answer's."""
    for name in (
        "decode_admit_seconds",
        "prefill_queue_seconds",
        "prefill_compute_seconds",
        "decode_wait_seconds",
        "decode_seconds",
    ):
        setattr(total, name, getattr(total, name) + getattr(part, name))
    if not part.HasField("transfer"):
        return
    ours, theirs = total.transfer, part.transfer
    overlapped = ours.overlapped_share * ours.seconds + theirs.overlapped_share * theirs.seconds
    ours.transport = theirs.transport
    ours.payload_bytes += theirs.payload_bytes
    ours.frames += theirs.frames
    ours.seconds += theirs.seconds
    ours.overlapped_share = overlapped / ours.seconds if ours.seconds else 0.0
