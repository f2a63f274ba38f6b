"""The engine's one loop: `step() = schedule -> run -> commit`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvbaton.engine.request import Request
from kvbaton.engine.scheduler import Batch, Scheduler, TokenSampled

Clock = Callable[[], float]
"""Seconds, from any fixed origin."""


class Runner(Protocol):
    """What computes a batch; the only thing in the engine's sight that touches a device."""

    def run(self, batch: Batch) -> Sequence[int]:
        """Compute every slice, keep its KV, and return one token for each slice that samples, in order."""
        ...


@dataclass(slots=True)
class EngineCounters:
    """Totals since start."""

    num_steps: int = 0
    prefill_tokens_computed: int = 0
    decode_tokens_computed: int = 0


@dataclass(slots=True)
class StepResult:
    """What one step changed."""

    admitted: list[Request]
    sampled: list[TokenSampled]
    failed: list[Request] = field(default_factory=list)
    error: Exception | None = None
    """Why the requests of `failed` ended; raised by the runner."""
    worked: bool = False
    """Whether anything was computed."""


class Engine:
    """A scheduler and a runner, stepped from one thread."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        """The engine owns both from here on."""
        self.scheduler = scheduler
        self.counters = EngineCounters()
        self._runner = runner

    def step(self, clock: Clock) -> StepResult:
        """Admit what fits, compute one batch, record its tokens.

        A runner that raises ends the requests of its batch, and no others.
        """
        admitted = self.scheduler.admit(clock())
        batch = self.scheduler.schedule(clock())
        if not batch:
            return StepResult(admitted, [])
        prefill_tokens, decode_tokens = batch.num_prefill_tokens, batch.num_decode_tokens
        try:
            token_ids = self._runner.run(batch)
        except Exception as error:
            failed = [piece.request for piece in batch.slices]
            for request in failed:
                self.scheduler.fail(request.request_id, clock())
            return StepResult(admitted, [], failed, error, worked=True)
        sampled = self.scheduler.commit(batch, token_ids, clock())
        self.counters.num_steps += 1
        self.counters.prefill_tokens_computed += prefill_tokens
        self.counters.decode_tokens_computed += decode_tokens
        return StepResult(admitted, sampled, worked=True)
