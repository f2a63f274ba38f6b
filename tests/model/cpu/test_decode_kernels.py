"""Both decode kernels are softmax attention over the blocks of each sequence, and look at nothing beyond them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvbaton.model.cpu import decode_dot_kernel, decode_kernel
from kvbaton.model.cpu.numeric import as_array, has_bfloat16_unit

NONE = np.empty(0, np.float32)
needs_unit = pytest.mark.skipif(not has_bfloat16_unit(), reason="this machine has no bfloat16 unit")

Kernel = Callable[..., None]
Kept = tuple[torch.Tensor, torch.Tensor]
Sequences = tuple[torch.Tensor, torch.Tensor]
VARIANTS = [(0, 0.0, False), (5, 0.0, False), (11, 3.0, True), (1, 0.0, False), (100, 0.0, True)]
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


def attended(
    attend: Kernel, query: torch.Tensor, kept: Kept, sequences: Sequences, variant: tuple[int, float, bool]
) -> torch.Tensor:
    """The kernel's output for `query` [n, heads, k_dim]."""
    window, softcap, sunk = variant
    output = torch.full((*query.shape[:2], kept[1].shape[-1]), float("nan"), dtype=query.dtype)
    attend(
        as_array(query),
        *(as_array(blocks) for blocks in kept),
        *(numbers.numpy() for numbers in sequences),
        window,
        np.float32(0.2),
        np.float32(softcap),
        torch.linspace(-2, 2, query.shape[1]).numpy() if sunk else NONE,
        as_array(output),
    )
    return output


def paged(dtype: torch.dtype, dims: tuple[int, int], heads: tuple[int, int], block: int) -> tuple[Any, ...]:
    """Queries of some sequences, their blocks, tables and lengths, and K and V of each; NaN is where nobody wrote."""
    generator = torch.Generator().manual_seed(sum(heads))
    lengths = [1, 7, 8, 19, 30]
    width = -(-max(lengths) // block)
    tables = torch.randperm(width * len(lengths), generator=generator).view(len(lengths), width)
    query = torch.randn(len(lengths), heads[0], dims[0], generator=generator).to(dtype)
    kept, rows = [], []
    for dim in dims:
        whole = torch.randn(len(lengths), width * block, heads[1], dim, generator=generator).to(dtype)
        for sequence, length in zip(whole, lengths, strict=True):
            sequence[length:] = float("nan")
        blocks = torch.empty(tables.numel(), block, heads[1], dim, dtype=dtype)
        blocks[tables.flatten()] = whole.view(-1, block, heads[1], dim)
        kept.append(blocks)
        rows.append([sequence[:length] for sequence, length in zip(whole, lengths, strict=True)])
    return query, tuple(kept), (tables, torch.tensor(lengths)), list(zip(*rows, strict=True))


@pytest.mark.parametrize(("attend", "dtype", "dims"), CASES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2), (7, 1), (1, 1), (21, 3)])
@pytest.mark.parametrize("block", [8, 24])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_textbook(
    attend: Kernel,
    dtype: torch.dtype,
    dims: tuple[int, int],
    heads: tuple[int, int],
    block: int,
    variant: tuple[int, float, bool],
) -> None:
    query, kept, sequences, rows = paged(dtype, dims, heads, block)
    output = attended(attend, query, kept, sequences, variant)
    sinks = torch.linspace(-2, 2, heads[0]) if variant[2] else None
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    for row, (own_keys, own_values) in enumerate(rows):
        wanted = expected(query[row], own_keys, own_values, variant[0], variant[1], sinks)
        torch.testing.assert_close(output[row].double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("block", [1, 3, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_of_other_sizes(block: int, variant: tuple[int, float, bool]) -> None:
    query, kept, sequences, rows = paged(torch.float32, (24, 5), (6, 2), block)
    output = attended(decode_kernel.attend_decodes, query, kept, sequences, variant)
    sinks = torch.linspace(-2, 2, 6) if variant[2] else None
    for row, (own_keys, own_values) in enumerate(rows):
        wanted = expected(query[row], own_keys, own_values, variant[0], variant[1], sinks)
        torch.testing.assert_close(output[row].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("attend", "dtype", "dims"), CASES)
@pytest.mark.parametrize("which", [0, 1])
def test_nan_stays_in_its_sequence(attend: Kernel, dtype: torch.dtype, dims: tuple[int, int], which: int) -> None:
    query, kept, sequences, _ = paged(dtype, dims, (6, 2), 8)
    before = attended(attend, query, kept, sequences, VARIANTS[0])
    kept[which][sequences[0][3, 1], 2] = float("nan")
    after = attended(attend, query, kept, sequences, VARIANTS[0])
    assert after[3].isnan().all()
    others = [0, 1, 2, 4]
    assert torch.equal(after[others], before[others])
