"""A step admits, computes and records; a runner that fails ends its own batch and nothing else."""

import itertools
from collections.abc import Callable

import pytest

from kvbaton.engine.core import Engine
from kvbaton.engine.output import SampledToken, StepOutput
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Phase, Request, Route
from kvbaton.engine.result import StepResult
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Batch, Limits, Scheduler
from support.requests import new_request

serial = itertools.count()


class FakeRunner:
    """Samples 100, 101, ... and remembers what it was asked; raises what it is told to."""

    def __init__(self) -> None:
        self.tokens = itertools.count(100)
        self.batches: list[list[tuple[str, int, int]]] = []
        self.error: BaseException | None = None

    def run(self, batch: Batch) -> StepOutput:
        """See `Runner.run`."""
        self.batches.append([(s.request.request_id, s.start, s.num_tokens) for s in batch.slices])
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return StepOutput([SampledToken(next(self.tokens)) for piece in batch.slices if piece.samples])


def ticking() -> Callable[[], float]:
    ticks = itertools.count()
    return lambda: float(next(ticks))


def make(max_prefill_tokens: int = 4, max_decode_seqs: int = 8) -> tuple[Engine, FakeRunner]:
    limits = Limits(max_prefill_tokens=max_prefill_tokens, max_decode_seqs=max_decode_seqs, max_waiting=8)
    runner = FakeRunner()
    return Engine(Scheduler(BlockPool(8, 4), limits, frozenset({2}), 100), runner), runner


def add(engine: Engine, name: str, num_prompt: int, max_tokens: int = 3, route: Route = Route.LOCAL) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=0)
    # No two prompts begin alike: the prefix cache has tests of its own.
    prompt = [7 + next(serial), *[7] * (num_prompt - 1)]
    return engine.scheduler.add(new_request(name, prompt, sampling, route), 0.0)


def test_an_idle_step_computes_nothing() -> None:
    engine, runner = make()
    result = engine.step(ticking())
    assert result == StepResult()
    assert runner.batches == []
    assert engine.counters.num_steps == 0


def test_a_step_that_only_admits_did_not_work() -> None:
    engine, runner = make()
    request = add(engine, "a", 3, route=Route.RECEIVE)
    result = engine.step(ticking())
    assert result.admitted == [request]
    assert not result.worked
    assert runner.batches == []


def test_steps_run_to_the_end_and_are_counted() -> None:
    engine, runner = make()
    clock = ticking()
    first = add(engine, "first", 6)
    result = engine.step(clock)
    assert result.worked
    assert result.admitted == [first]
    assert result.sampled == []
    second = add(engine, "second", 2)
    sampled = [[(e.request.request_id, e.index, e.token_id) for e in engine.step(clock).sampled] for _ in range(4)]
    assert runner.batches[:3] == [
        [("first", 0, 4)],
        [("first", 4, 2), ("second", 0, 2)],
        [("first", 6, 1), ("second", 2, 1)],
    ]
    assert sampled == [
        [("first", 0, 100), ("second", 0, 101)],
        [("first", 1, 102), ("second", 1, 103)],
        [("first", 2, 104), ("second", 2, 105)],
        [],
    ]
    assert first.phase is second.phase is Phase.FINISHED
    counters = engine.counters
    assert (counters.num_steps, counters.prefill_tokens_computed, counters.decode_tokens_computed) == (4, 8, 4)
    assert engine.scheduler.pool.num_free == 8


def test_milestones_come_from_the_steps_clock() -> None:
    engine, _ = make()
    request = add(engine, "a", 2, max_tokens=1)
    engine.step(ticking())
    at = request.milestones
    assert (at.admitted, at.prefill_started, at.prefill_ended, at.finished) == (1.0, 2.0, 4.0, 4.0)


class TimedRunner(FakeRunner):
    """Takes a hundredth of a second, and a thousandth for each token."""

    now = 0.0

    def run(self, batch: Batch) -> StepOutput:
        self.now += 0.01 + 0.001 * (batch.num_prefill_tokens + batch.num_decode_tokens)
        return super().run(batch)


def test_with_a_target_prompts_go_in_chunks_that_decodes_have_time_for() -> None:
    runner = TimedRunner()
    limits = Limits(max_prefill_tokens=500, max_decode_seqs=8, max_waiting=8, target_itl=0.1)
    engine = Engine(Scheduler(BlockPool(2000, 4), limits, frozenset({2}), 10_000), runner)
    add(engine, "decoding", 1, max_tokens=100)
    engine.step(lambda: runner.now)
    long = add(engine, "long", 3000)
    took = []
    while long.phase is not Phase.DECODING:
        before = runner.now
        engine.step(lambda: runner.now)
        took.append(runner.now - before)
    assert max(took) < 0.15
    assert min(took[5:-1]) > 0.09
    engine.scheduler.remove("decoding", 0.0)
    engine.scheduler.remove("long", 0.0)
    add(engine, "alone", 800)
    engine.step(lambda: runner.now)
    assert runner.batches[-1] == [("alone", 0, 500)], "nobody waits for a token"


def test_a_failing_runner_ends_its_batch_and_nobody_else() -> None:
    engine, runner = make(max_decode_seqs=1)
    clock = ticking()
    decoding, idle = add(engine, "decoding", 1), add(engine, "idle", 1)
    engine.step(clock)
    prompt = add(engine, "prompt", 2)
    received = add(engine, "received", 4, route=Route.RECEIVE)
    waiting = add(engine, "waiting", 20)
    runner.error = RuntimeError("out of memory")
    result = engine.step(clock)
    assert [(request, str(error)) for request, error in result.failed] == [
        (decoding, "out of memory"),
        (prompt, "out of memory"),
    ]
    assert result.worked
    assert result.sampled == []
    assert [r.phase for r in (decoding, prompt)] == [Phase.FINISHED] * 2
    assert idle.phase is Phase.DECODING
    assert received.phase is Phase.RECEIVING
    assert engine.counters.num_steps == 1
    assert engine.counters.prefill_tokens_computed == 2
    engine.scheduler.check_integrity()

    engine.scheduler.kv_received("received", 50, 0.0)
    while waiting.phase is not Phase.FINISHED:
        assert not engine.step(clock).failed
    assert [len(r.output) for r in (idle, received, waiting)] == [3, 3, 3]
    assert engine.scheduler.pool.num_free == 8


def test_a_failure_that_is_no_exception_goes_through() -> None:
    engine, runner = make()
    add(engine, "a", 2)
    runner.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.step(ticking())


def test_a_failed_prompt_keeps_its_blocks_while_a_transfer_may_read_them() -> None:
    engine, runner = make()
    request = add(engine, "a", 6, route=Route.HAND_OFF)
    runner.error = RuntimeError("out of memory")
    assert [failed for failed, _ in engine.step(ticking()).failed] == [request]
    assert request.blocks
    assert not engine.step(ticking()).worked, "it is not tried again"
    engine.scheduler.check_integrity()
    engine.scheduler.remove("a", 0.0)
    assert engine.scheduler.pool.num_free == 8
