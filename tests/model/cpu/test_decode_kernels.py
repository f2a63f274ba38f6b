"""Both decode kernels are softmax attention over the blocks of each sequence, and look at nothing beyond them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvbaton.model.cpu import decode_dot_kernel, decode_kernel
from kvbaton.model.cpu.numeric import as_array, has_bfloat16_unit

BLOCK = 8
NONE = np.empty(0, np.float32)
needs_unit = pytest.mark.skipif(not has_bfloat16_unit(), reason="this machine has no bfloat16 unit")

Kernel = Callable[..., None]
VARIANTS = [(0, 0.0, False), (5, 0.0, False), (11, 3.0, True)]
"""Window, soft cap, and whether there are sinks."""

CASES: list[Any] = [
    pytest.param(decode_kernel.attend_decodes, torch.float32, (24, 5), id="float32"),
    pytest.param(decode_kernel.attend_decodes, torch.bfloat16, (24, 5), id="bfloat16"),
    pytest.param(decode_dot_kernel.attend_decodes, torch.bfloat16, (64, 32), id="dot", marks=needs_unit),
]


def expected(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`query` [heads, k], `keys` and `values` [tokens, kv_heads, dim]: [heads, v] in float64."""
    group = len(query) // keys.shape[1]
    query, keys, values = query.double(), keys.double().repeat_interleave(group, 1), values.double()
    values = values.repeat_interleave(group, 1)
    if window:
        keys, values = keys[-window:], values[-window:]
    scores = torch.einsum("hd,thd->ht", query, keys) * 0.2
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None]], 1)
    weights = scores.softmax(-1)[:, : len(keys)]
    return torch.einsum("ht,thd->hd", weights, values)


@pytest.mark.parametrize(("attend", "dtype", "dims"), CASES)
@pytest.mark.parametrize("heads", [2, 4, 6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_textbook(
    attend: Kernel, dtype: torch.dtype, dims: tuple[int, int], heads: int, variant: tuple[int, float, bool]
) -> None:
    (k_dim, v_dim), (window, softcap, sunk) = dims, variant
    generator = torch.Generator().manual_seed(heads)
    kv_heads, lengths = 2, [1, 7, BLOCK, 19, 30]
    tables = torch.randperm(4 * len(lengths), generator=generator).view(len(lengths), 4)
    shape = (tables.numel(), BLOCK, kv_heads)
    keys = torch.randn(*shape, k_dim, generator=generator).to(dtype)
    values = torch.randn(*shape, v_dim, generator=generator).to(dtype)
    query = torch.randn(len(lengths), heads, k_dim, generator=generator).to(dtype)
    sinks = torch.linspace(-2, 2, heads) if sunk else None
    rows = [
        (keys[table].flatten(0, 1)[:length].clone(), values[table].flatten(0, 1)[:length].clone())
        for table, length in zip(tables, lengths, strict=True)
    ]
    for table, length in zip(tables, lengths, strict=True):
        for position in range(length, 4 * BLOCK):
            keys[table[position // BLOCK], position % BLOCK] = float("nan")
            values[table[position // BLOCK], position % BLOCK] = float("nan")
    output = torch.full((len(lengths), heads, v_dim), float("nan"), dtype=dtype)
    attend(
        *[as_array(tensor) for tensor in (query, keys, values)],
        tables.numpy(),
        np.array(lengths),
        window,
        np.float32(0.2),
        np.float32(softcap),
        NONE if sinks is None else sinks.numpy(),
        as_array(output),
    )
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    for row, (own_keys, own_values) in enumerate(rows):
        wanted = expected(query[row], own_keys, own_values, window, softcap, sinks)
        torch.testing.assert_close(output[row].double(), wanted, rtol=tolerance, atol=tolerance)
