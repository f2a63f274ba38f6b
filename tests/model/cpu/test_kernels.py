"""Each compiled kernel is what torch computes in float32, rounded once, in both element types."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from kvbaton.model.cpu.kernels import masked_softmax, rms_norm, rotate_heads, silu_gate, softmax
from kvbaton.model.cpu.numeric import as_array, element, exp, kernel

DTYPES = [torch.float32, torch.bfloat16]
NONE = np.empty(0, np.float32)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """`expected` is float32; a bfloat16 result is it, rounded to 8 bits."""
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[actual.dtype]
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=2e-6)


@kernel
def exp_of(values: Any, output: Any) -> None:
    for i in range(values.shape[0]):
        output[i] = exp(values[i])


def test_exp() -> None:
    values = np.linspace(-100, 87, 4001, dtype=np.float32)
    output = np.empty_like(values)
    exp_of(values, output)
    seen = values > -87
    np.testing.assert_allclose(output[seen], np.exp(values[seen].astype(np.float64)), rtol=4e-7)
    assert not output[values < -87].any()
    exp_of(np.array([np.nan, -np.inf, 0.0], np.float32), output)
    assert np.isnan(output[0])
    assert output[1:3].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 64, 100])
def test_rms_norm(dtype: torch.dtype, dim: int) -> None:
    rows, weight = random(5, dim, dtype=dtype), random(dim, seed=1)
    output = torch.empty_like(rows)
    rms_norm(as_array(rows), weight.numpy(), np.float32(1e-6), as_array(output))
    close(output, functional.rms_norm(rows.float(), (dim,), weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_gate(dtype: torch.dtype) -> None:
    both = random(4, 66, dtype=dtype) * 20
    both[0, :3] = torch.tensor([-300.0, 300.0, 0.0])
    output = torch.empty(4, 33, dtype=dtype)
    silu_gate(as_array(both), as_array(output))
    gate, up = both.float().chunk(2, -1)
    close(output, functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("rotated", [16, 8])
def test_rotate_heads(dtype: torch.dtype, normalised: bool, rotated: int) -> None:
    tokens, heads, kv_heads, dim = 3, 4, 2, 16
    projected = random(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    cos, sin = random(tokens, rotated, dtype=dtype, seed=1), random(tokens, rotated, dtype=dtype, seed=2)
    weights = [random(dim, seed=3), random(dim, seed=4)]
    query, key = torch.empty(tokens, heads, dim, dtype=dtype), torch.empty(tokens, kv_heads, dim, dtype=dtype)
    given = [weight.numpy() if normalised else NONE for weight in weights]
    arrays = [as_array(tensor) for tensor in (cos, sin, query, key)]
    rotate_heads(as_array(projected), given[0], given[1], np.float32(1e-6), *arrays)
    split = projected.float().view(tokens, -1, dim)
    for result, part, weight in (
        (query, split[:, :heads], weights[0]),
        (key, split[:, heads : heads + kv_heads], weights[1]),
    ):
        values = functional.rms_norm(part, (dim,), weight, 1e-6) if normalised else part
        turned, rest = values[..., :rotated], values[..., rotated:]
        low, high = turned.chunk(2, -1)
        turned = turned * cos.float()[:, None] + torch.cat([-high, low], -1) * sin.float()[:, None]
        torch.testing.assert_close(
            result.float(), torch.cat([turned, rest], -1).to(dtype).float(), rtol=2**-7, atol=1e-5
        )


def test_rotation_stays_within_a_head() -> None:
    rows, wide = random(1, 8), torch.ones(1, 12)
    buffer = torch.zeros(3, 1, 4)
    query, key, _ = (part[None] for part in buffer)
    rotate_heads(rows.numpy(), NONE, NONE, np.float32(0), wide.numpy(), wide.numpy(), query.numpy(), key.numpy())
    assert not buffer[2].any(), "written beyond the last head"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("first_key", [0, 3])
def test_masked_softmax(dtype: torch.dtype, window: int, first_key: int) -> None:
    kv_heads, group, queries, keys, first_query = 2, 3, 4, 12 - first_key, 8
    scores = random(kv_heads, group, queries, keys) * 3
    weights = torch.empty(scores.shape, dtype=dtype)
    at, of = torch.arange(queries)[:, None] + first_query, torch.arange(keys)[None] + first_key
    mask = of <= at
    if window:
        mask &= of > at - window
    expected = (scores * 0.5).masked_fill(~mask, float("-inf")).softmax(-1)
    array = as_array(scores)
    masked_softmax(array, first_query, first_key, window, np.float32(0.5), np.float32(0), NONE, as_array(weights))
    close(weights, expected)
    assert not weights[..., ~mask].any()


def test_nan_stays_in_its_row() -> None:
    scores = np.zeros(5, np.float32)
    scores[2] = np.nan
    softmax(scores, np.float32(0), np.float32(-np.inf))
    assert np.isnan(scores).all()


ROUNDED = {
    0x3F800000: 0x3F80,  # 1
    0x3F808000: 0x3F80,  # a tie, to even
    0x3F818000: 0x3F82,  # a tie, to even
    0x3F808001: 0x3F81,
    0xBF80FFFF: 0xBF81,
    0x7F7FFFFF: 0x7F80,  # the largest number, to infinity
    0x7F800000: 0x7F80,
    0xFF800000: 0xFF80,
    0x80000000: 0x8000,
}


@kernel
def rounded(values: Any, output: Any) -> None:
    for i in range(values.shape[0]):
        output[i] = element(values[i], output[i])


def test_rounding_to_bfloat16() -> None:
    output = np.empty(len(ROUNDED), np.uint16)
    rounded(np.array(list(ROUNDED), np.uint32).view(np.float32), output)
    assert [hex(bits) for bits in output] == [hex(bits) for bits in ROUNDED.values()]
    rounded(np.array([0x7F800001, 0x7FFFFFFF, 0xFFC00000], np.uint32).view(np.float32), output)
    assert torch.from_numpy(output[:3]).view(torch.bfloat16).isnan().all()
