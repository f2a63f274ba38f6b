"""The chunk that fits a target step time is found on workers of very different kinds, and found again after trouble."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine.budget import MIN_CHUNK, ChunkBudget, StepShape

Cost = Callable[[StepShape], float]


def small_cpu(step: StepShape) -> float:
    attention = 2e-7 * step.decode_context + 1e-8 * step.prefill_pairs
    return 0.008 + 0.0007 * step.decode_seqs + 0.0004 * step.prefill_tokens + attention


def gpu(step: StepShape) -> float:
    """Bound by memory until there are enough tokens: not linear."""
    attention = 1e-8 * step.decode_context + 1e-10 * step.prefill_pairs
    return max(0.006, 3e-5 * (step.decode_seqs + step.prefill_tokens)) + attention


def slowed(cost: Cost, factor: float) -> Cost:
    return lambda step: factor * cost(step)


class Simulation:
    """Eight decodes beside prompts of 4,000 tokens, one after another with pauses; step times are noisy."""

    decodes = StepShape(8, 8 * 500)

    def __init__(self, cost: Cost, target: float) -> None:
        self.budget, self.cost, self.target = ChunkBudget(), cost, target
        self.rng = random.Random(1)
        self.start = self.pause = 0

    def run(self, num_steps: int, *, held_up: float = 1) -> list[tuple[int, float]]:
        """Chunk and seconds, over the target, of each step that carried one."""
        steps = []
        for _ in range(num_steps):
            chunk = 0
            if self.pause:
                self.pause -= 1
            else:
                chunk = min(self.budget.choose(self.target, self.decodes, self.start, 2048), 4000 - self.start)
            pairs = chunk * self.start + chunk * (chunk + 1) // 2
            step = StepShape(self.decodes.decode_seqs, self.decodes.decode_context, chunk, pairs)
            seconds = held_up * self.cost(step) * self.rng.uniform(0.9, 1.1)
            self.budget.observe(step, seconds)
            self.start += chunk
            if self.start == 4000:
                self.start, self.pause = 0, self.rng.randrange(10)
            if chunk:
                steps.append((chunk, seconds / self.target))
        return steps


def times(steps: list[tuple[int, float]]) -> list[float]:
    return sorted(seconds for _, seconds in steps)


@pytest.mark.parametrize(("cost", "target"), [(small_cpu, 0.05), (small_cpu, 0.2), (gpu, 0.03)])
def test_steps_take_what_they_may_and_hardly_more(cost: Cost, target: float) -> None:
    simulation = Simulation(cost, target)
    simulation.run(60)
    taken = times(simulation.run(300))
    assert taken[len(taken) // 2] > 0.85
    assert taken[len(taken) * 9 // 10] < 1.2
    assert taken[-1] < 1.5


def test_the_first_chunks_grow_from_the_smallest() -> None:
    chunks = [chunk for chunk, _ in Simulation(gpu, 0.03).run(5)]
    assert chunks == [MIN_CHUNK * 2**step for step in range(5)]


def test_a_step_that_was_held_up_changes_little() -> None:
    simulation = Simulation(small_cpu, 0.05)
    before = simulation.run(100)[-1][0]
    simulation.run(1, held_up=50)
    after = [chunk for chunk, _ in simulation.run(30) if chunk]
    assert min(after) > 0.7 * before
    assert after[-1] > 0.9 * before


def test_a_worker_that_slows_down_or_recovers_is_believed() -> None:
    simulation = Simulation(small_cpu, 0.05)
    simulation.run(100)
    simulation.cost = slowed(small_cpu, 2)
    simulation.run(30)
    assert times(simulation.run(60))[-1] < 1.3
    simulation.cost = small_cpu
    simulation.run(30)
    assert times(simulation.run(60))[30] > 0.8


def test_prompts_get_on_when_the_target_cannot_be_met() -> None:
    assert {chunk for chunk, _ in Simulation(small_cpu, 0.001).run(400) if chunk != 4000 % MIN_CHUNK} == {MIN_CHUNK}


def test_what_a_prompt_costs_is_remembered_while_none_comes() -> None:
    simulation = Simulation(small_cpu, 0.05)
    simulation.run(100)
    simulation.pause = 5000
    simulation.run(5000)
    assert max(seconds for _, seconds in simulation.run(5)) < 1.3


def test_a_clock_that_stands_still_tells_nothing() -> None:
    budget = ChunkBudget()
    budget.observe(StepShape(1, 10, 500, 10), 0.0)
    assert budget.predict(StepShape(1, 10, 500, 10)) == 0
    assert budget.choose(1.0, StepShape(), 0, 2048) == MIN_CHUNK


SHAPES = st.builds(StepShape, st.integers(0, 256), st.integers(0, 10**6), st.integers(0, 10**5), st.integers(0, 10**10))


@given(
    steps=st.lists(st.tuples(SHAPES, st.floats(1e-6, 1e3)), max_size=20),
    target=st.floats(1e-3, 10),
    start=st.integers(0, 10**6),
    most=st.integers(0, 10**5),
)
def test_the_choice_is_within_bounds_after_whatever_was_seen(
    steps: list[tuple[StepShape, float]], target: float, start: int, most: int
) -> None:
    budget = ChunkBudget()
    for shape, seconds in steps:
        budget.observe(shape, seconds)
        assert 0 <= budget.predict(shape) < float("inf")
    largest = max((shape.prefill_tokens for shape, _ in steps), default=0)
    chunk = budget.choose(target, StepShape(8, 4000), start, most)
    assert min(most, MIN_CHUNK) <= chunk <= min(most, max(MIN_CHUNK, 2 * largest))
