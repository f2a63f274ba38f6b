"""A token is a function of its logits, parameters, seed and position, and its distribution is the softmax's."""

import math
from typing import Any

import pytest
import torch

from kvbaton.engine.sampling import MAX_SEED, SamplingParams
from kvbaton.model.sampler import gumbel_noise, keep_top, sample, uniform

VOCAB = 24
INF = math.inf


def logits_of(rows: int, seed: int = 5, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def params(seed: int = 1, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, "seed": seed, "temperature": 1.0, **changes})


VARIETY = [
    params(seed, temperature=temperature, top_k=top_k, top_p=top_p)
    for seed, (temperature, top_k, top_p) in enumerate(
        [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 5, 1.0), (2.0, 0, 0.8), (1.3, 3, 0.5), (1.0, 1, 1.0), (5.0, 0, 1.0)] * 5
    )
][:32]


def test_greedy_is_the_argmax() -> None:
    logits = logits_of(8)
    assert sample(logits, [params(temperature=0.0)] * 8, range(8)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_same_alone_in_a_batch_and_in_any_order(dtype: torch.dtype) -> None:
    logits, positions = logits_of(32).to(dtype), [7 * n + 1 for n in range(32)]
    together = sample(logits, VARIETY, positions)
    alone = [sample(logits[n : n + 1], [VARIETY[n]], [positions[n]])[0] for n in range(32)]
    assert together == alone
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = sample(logits[order], [VARIETY[n] for n in order], [positions[n] for n in order])
    assert shuffled == [together[n] for n in order]


def test_seeds_and_positions_make_independent_draws() -> None:
    flat = torch.zeros(64, 1000)
    by_position = sample(flat, [params(3)] * 64, range(64))
    by_seed = sample(flat, [params(seed) for seed in range(64)], [0] * 64)
    # 64 draws of 1000: two are expected to meet; as a whole run they never repeat.
    assert len(set(by_position)) > 55
    assert len(set(by_seed)) > 55
    assert by_position != by_seed
    # Seed s at position p + 1 is not seed s + 1 at position p.
    diagonal = sample(flat, [params(seed + 1) for seed in range(64)], [0] * 64)
    assert (
        sum(a == b for a, b in zip(diagonal, sample(flat, [params(s) for s in range(64)], [1] * 64), strict=True)) < 5
    )


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, MAX_SEED])
@pytest.mark.parametrize("position", [0, 1, 2**31, 2**40])
def test_noise_is_finite_and_repeatable_for_extreme_seeds(seed: int, position: int) -> None:
    signed = seed - 2**64 if seed >= 2**63 else seed
    seeds, positions = torch.tensor([signed]), torch.tensor([position])
    noise = gumbel_noise(seeds, positions, 5000)
    assert noise.dtype is torch.float32
    assert bool(noise.isfinite().all())
    assert torch.equal(noise, gumbel_noise(seeds, positions, 5000))
    assert len(set(noise[0].tolist())) > 4990
    assert sample(torch.zeros(1, 5000), [params(seed)], [position]) == [int(noise.argmax())]


def test_uniform_never_reaches_its_ends() -> None:
    ends = uniform(torch.tensor([0, -1]))
    assert 0 < float(ends[0]) < 1e-15
    assert 1 - 1e-15 < float(ends[1]) < 1
    assert bool((-torch.log(-torch.log(ends))).isfinite().all())


def test_the_noise_is_gumbels() -> None:
    noise = gumbel_noise(torch.arange(50), torch.arange(50), 2000).double().flatten()
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.015)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)


def critical_value(degrees: int) -> float:
    """Of chi-squared, passed by chance once in a thousand (Wilson and Hilferty's approximation)."""
    term = 2 / (9 * degrees)
    return float(degrees * (1 - term + 3.0902 * math.sqrt(term)) ** 3)


def chi_squared(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom, bins of fewer than five expected draws together."""
    expected = probabilities * counts.sum()
    large = expected >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    present = expected > 0
    observed, expected = observed[present], expected[present]
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def exact(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution that the parameters mean, token by token in plain float64."""
    weights = (logits.double() / temperature).softmax(-1).tolist()
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = ranked[:top_k] if top_k else ranked
    total, before = sum(weights[token] for token in kept), 0.0
    nucleus: list[int] = []
    for token in kept:
        if before >= top_p and nucleus:
            break
        nucleus.append(token)
        before += weights[token] / total
    result = torch.zeros(len(weights), dtype=torch.float64)
    result[nucleus] = torch.tensor([weights[token] for token in nucleus], dtype=torch.float64)
    return result / result.sum()


@pytest.mark.parametrize("across", ["positions", "seeds"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (3.0, 0, 1.0), (1.0, 6, 1.0), (1.0, 0, 0.97), (1.5, 10, 0.7), (1.0, 1000, 1.0)],
)
def test_draws_have_the_exact_distribution(across: str, temperature: float, top_k: int, top_p: float) -> None:
    num = 20_000
    logits = logits_of(1, seed=9)[0]
    changes = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    if across == "positions":
        tokens = sample(logits.expand(num, -1), [params(1234, **changes)] * num, range(num))
    else:
        tokens = sample(logits.expand(num, -1), [params(seed, **changes) for seed in range(num)], [17] * num)
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    probabilities = exact(logits, temperature, top_k, top_p)
    assert float(counts[probabilities == 0].sum()) == 0
    statistic, degrees = chi_squared(counts, probabilities)
    assert degrees >= 2
    assert statistic < critical_value(degrees)


def test_the_chi_squared_test_can_fail() -> None:
    logits = logits_of(1, seed=9)[0]
    tokens = sample(logits.expand(20_000, -1), [params(1234, temperature=1.1)] * 20_000, range(20_000))
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    statistic, degrees = chi_squared(counts, exact(logits, 1.0, 0, 1.0))
    assert statistic > critical_value(degrees)


def test_neighbouring_positions_are_independent() -> None:
    tokens = torch.tensor(sample(torch.zeros(20_000, 5), [params(77)] * 20_000, range(20_000)))
    pairs = torch.bincount(tokens[:-1] * 5 + tokens[1:], minlength=25).double()
    statistic, degrees = chi_squared(pairs, torch.full((25,), 1 / 25, dtype=torch.float64))
    assert statistic < critical_value(degrees)


@pytest.mark.parametrize(
    ("logits", "top_k", "top_p", "kept"),
    [
        ([1.0, 3.0, 2.0], 1, 1.0, {1}),
        ([1.0, 3.0, 2.0], 2, 1.0, {1, 2}),
        ([1.0, 3.0, 2.0], 3, 1.0, {0, 1, 2}),
        ([1.0, 3.0, 2.0], 99, 1.0, {0, 1, 2}),
        ([1.0, 3.0, 2.0], 0, 1.0, {0, 1, 2}),
        ([1.0, 3.0, 2.0], 0, 5e-324, {1}),
        ([1.0, 3.0, 2.0], 0, 0.6, {1}),  # 0.665, 0.245, 0.090
        ([1.0, 3.0, 2.0], 0, 0.7, {1, 2}),
        ([1.0, 3.0, 2.0], 2, 0.72, {1}),  # 0.731 of the two that are left
        # Of equals, the lower ids.
        ([2.0, 2.0, 2.0, 2.0], 2, 1.0, {0, 1}),
        ([2.0, 2.0, 2.0, 2.0], 0, 0.5, {0, 1}),
        ([2.0, 2.0, 2.0, 2.0], 0, 0.51, {0, 1, 2}),
        ([0.0, 5.0, 5.0], 1, 1.0, {1}),
        # Nothing is lost without a nucleus, however far the sum of the first is rounded up to 1.
        ([100.0, 0.0, -100.0], 0, 1.0, {0, 1, 2}),
    ],
)
def test_what_is_kept(logits: list[float], top_k: int, top_p: float, kept: set[int]) -> None:
    rows = torch.tensor([logits])
    result = keep_top(rows, torch.tensor([top_k]), torch.tensor([top_p]))
    assert {token for token, value in enumerate(result[0].tolist()) if value > -INF} == kept
    assert torch.equal(result[result > -INF], rows[result > -INF])


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-6])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (2, 1.0), (0, 0.9)])
def test_next_to_no_temperature_is_greedy(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.tensor([[5.0, 9.0, 8.0], [-5.0, -9.0, -1.0]])
    changes = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    assert sample(logits, [params(4, **changes)] * 2, [3, 4]) == [1, 2]
