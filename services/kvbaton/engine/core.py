"""The engine's one loop: `step() = make room -> admit -> schedule -> run -> commit`."""

from collections.abc import Callable
from typing import Protocol

from kvbaton.engine.budget import StepShape
from kvbaton.engine.counters import EngineCounters
from kvbaton.engine.output import StepOutput
from kvbaton.engine.result import StepResult
from kvbaton.engine.scheduler import Batch, Scheduler

Clock = Callable[[], float]
"""Seconds, from any fixed origin."""


class Runner(Protocol):
    """What computes a batch; the only thing in the engine's sight that touches a device."""

    def run(self, batch: Batch) -> StepOutput:
        """Compute every slice, keep its KV, and return one token for each slice that samples, in order."""
        ...


class Engine:
    """A scheduler and a runner, stepped from one thread."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        """The engine owns both from here on."""
        self.scheduler = scheduler
        self._runner = runner

    @property
    def counters(self) -> EngineCounters:
        """What was done since the start."""
        return self.scheduler.counters

    def step(self, clock: Clock) -> StepResult:
        """`admit` and then `compute`, as one result."""
        begun, result = self.admit(clock), self.compute(clock)
        result.admitted, result.preempted = begun.admitted, begun.preempted
        return result

    def admit(self, clock: Clock) -> StepResult:
        """Make room for what decodes, and admit what fits: nobody need wait for the next batch to hear of it."""
        preempted = self.scheduler.make_room(clock())
        return StepResult(self.scheduler.admit(clock()), preempted)

    def compute(self, clock: Clock) -> StepResult:
        """Compute one batch and record its tokens, after `admit`.

        A runner that raises ends the requests of its batch, and no others.
        """
        batch = self.scheduler.schedule(clock())
        if not batch:
            return StepResult()
        result = self._compute(batch, clock)
        result.worked = True
        return result

    def _compute(self, batch: Batch, clock: Clock) -> StepResult:
        shape, started = _shape(batch), clock()
        try:
            output = self._runner.run(batch)
        except Exception as error:
            for piece in batch.slices:
                self.scheduler.fail(piece.request, clock())
            return StepResult(failed=[(piece.request, error) for piece in batch.slices])
        if self.scheduler.limits.target_itl is not None:
            self.scheduler.chunk_budget.observe(shape, clock() - started)
        result = self.scheduler.commit(batch, output, clock())
        self.counters.num_steps += 1
        self.counters.prefill_tokens_computed += shape.prefill_tokens
        self.counters.decode_tokens_computed += shape.decode_seqs
        return result


def _shape(batch: Batch) -> StepShape:
    decodes, prompts = batch.slices[: batch.num_decode_tokens], batch.slices[batch.num_decode_tokens :]
    return StepShape(
        decode_seqs=len(decodes),
        decode_context=sum(piece.start + 1 for piece in decodes),
        prefill_tokens=sum(piece.num_tokens for piece in prompts),
        prefill_pairs=sum(piece.num_tokens * (2 * piece.start + piece.num_tokens + 1) // 2 for piece in prompts),
    )
