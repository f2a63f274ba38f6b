"""One request's answers, from its admission to the last token of the last of them (docs/adr/0009).

The first answer goes ahead; the others follow to the same workers when the prompt's KV is in their caches.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvbaton.engine.sampling import MAX_SEED, SamplingParams
from kvbaton.router.admission import AdmittedRequest
from kvbaton.router.answer import Answer, Emit
from kvbaton.router.registry import Placement

SEED_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of a request's answers, modulo 2^64; odd, so that no two of them are equal."""


@dataclass(slots=True)
class Dispatch:
    """A request on its way."""

    request: AdmittedRequest
    choose: Callable[[], Placement]
    """Where an answer can go now. Raises UnavailableError when nowhere."""
    emit: Emit
    answers: list[Answer] = field(init=False)

    def __post_init__(self) -> None:
        self.answers = [
            Answer(self.request, number, sampling_of(self.request.sampling, number), self.choose, self.emit)
            for number in range(self.request.n)
        ]

    @property
    def first(self) -> Answer:
        """The answer that goes ahead, and that the request as a whole is described by."""
        return self.answers[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(len(answer.token_ids) for answer in self.answers)

    async def run(self, timeout: float | None) -> None:
        """Run every answer to its last token; `timeout` in seconds is what is left of the client's deadline.

        When one fails, or the client goes, all end. Raises an ExceptionGroup of the errors of the table,
        UnavailableError when a worker was lost.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        placement = self.choose()
        async with asyncio.TaskGroup() as group:
            for answer in self.answers[1:]:
                group.create_task(self._follow(answer, placement, deadline))
            await self.first.run(placement, len(self.request.prompt), deadline)

    async def _follow(self, answer: Answer, placement: Placement, deadline: float | None) -> None:
        """Run another answer where the first one is, whose prompt is known there now but for its last token."""
        await self.first.prefix_ready.wait()
        if placement.usable:
            await answer.run(placement, 1, deadline)
        else:
            await answer.run(self.choose(), len(self.request.prompt), deadline)


def sampling_of(sampling: SamplingParams, number: int) -> SamplingParams:
    """The parameters of answer `number`: what a request of its own would have to give to get the same tokens."""
    return dataclasses.replace(sampling, seed=(sampling.seed + number * SEED_STRIDE) & MAX_SEED)
