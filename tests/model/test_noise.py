"""The noise is a function of seed, position and token, and has Gumbel's distribution."""

import math

import pytest
import torch

from kvbaton.engine.sampling import MAX_SEED
from kvbaton.model.noise import gumbel_noise, signed, uniform
from kvbaton.model.sampler import sample
from support.sampling import EOS, row

MASK = 2**64 - 1


def plain_mix(value: int) -> int:
    """SplitMix64's finaliser in unsigned integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def plain_noise(seed: int, position: int, token_id: int) -> float:
    """The definition of docs/sampling.md, in plain Python."""
    golden = 0x9E3779B97F4A7C15
    row = plain_mix((plain_mix((seed + golden) & MASK) + position * golden) & MASK)
    bits = plain_mix((row + (token_id + 1) * golden) & MASK)
    return -math.log(-math.log(((bits >> 12) + 0.5) * 2.0**-52))


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, MAX_SEED])
@pytest.mark.parametrize("position", [0, 1, 2**31, 2**40])
def test_noise_is_what_the_documentation_says(seed: int, position: int) -> None:
    token_ids = torch.tensor([[0, 1, 77, 151_000]])
    noise = gumbel_noise(torch.tensor([signed(seed)]), torch.tensor([position]), token_ids)
    expected = [plain_noise(seed, position, int(token)) for token in token_ids[0]]
    assert noise[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, MAX_SEED])
@pytest.mark.parametrize("position", [0, 1, 2**31, 2**40])
def test_noise_is_finite_and_repeatable_for_extreme_seeds(seed: int, position: int) -> None:
    seeds, positions, token_ids = torch.tensor([signed(seed)]), torch.tensor([position]), torch.arange(5000)[None]
    noise = gumbel_noise(seeds, positions, token_ids)
    assert noise.dtype is torch.float32
    assert bool(noise.isfinite().all())
    assert torch.equal(noise, gumbel_noise(seeds, positions, token_ids))
    assert len(set(noise[0].tolist())) > 4990
    [sampled] = sample(torch.zeros(1, 5000), [row(seed, position)], EOS)
    assert sampled.token_id == int(noise.argmax())


def test_some_tokens_have_the_noise_that_they_have_among_all() -> None:
    seeds, positions = torch.tensor([3, 4]), torch.tensor([7, 7])
    every = gumbel_noise(seeds, positions, torch.arange(100)[None])
    some = torch.tensor([[5, 99, 0], [42, 1, 2]])
    assert torch.equal(gumbel_noise(seeds, positions, some), every.gather(-1, some))
    assert some.tolist() == [[5, 99, 0], [42, 1, 2]]
    assert (seeds.tolist(), positions.tolist()) == ([3, 4], [7, 7])


def test_uniform_never_reaches_its_ends() -> None:
    ends = uniform(torch.tensor([0, -1]))
    assert 0 < float(ends[0]) < 1e-15
    assert 1 - 1e-15 < float(ends[1]) < 1
    assert bool((-torch.log(-torch.log(ends))).isfinite().all())


def test_the_noise_is_gumbels() -> None:
    noise = gumbel_noise(torch.arange(50), torch.arange(50), torch.arange(2000)[None]).double().flatten()
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.015)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
