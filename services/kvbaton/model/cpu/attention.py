"""Attention on a CPU: decodes straight from the blocks by a compiled kernel, prompts by matrix products in tiles.

A prompt's tile is some queries against all keys that they may see: two products at the speed of the machine's matrix
unit, and one pass for scale, mask, softmax and rounding between them. Above the diagonal nothing is computed but the
corner of each tile. Scores are float32 whatever the model's dtype is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kvbaton.model.attention import LayerShape, Tensors
from kvbaton.model.cpu import decode_dot_kernel, decode_kernel, numeric
from kvbaton.model.cpu.kernels import masked_softmax
from kvbaton.model.cpu.numeric import as_array
from kvbaton.model.cpu.product_kernel import PANEL, multiply_heads
from kvbaton.model.ragged import Piece, RaggedBatch
from kvbaton.model.store import TorchKvStore

TILE = 128
"""Queries of one tile. Fewer leave the matrix unit idle, more waste work above the diagonal."""

_NO_SINKS = np.empty(0, np.float32)


class CpuAttention:
    """An `AttentionBackend` for float32 and bfloat16 in main memory."""

    def attend(
        self, layer: int, tensors: Tensors, shape: LayerShape, batch: RaggedBatch, store: TorchKvStore
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        query, key, value = tensors
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        if batch.num_decodes:
            assert batch.decode_tables is not None
            assert batch.decode_lengths is not None
            sequences = batch.decode_tables, batch.decode_lengths
            kept = store.keys[layer], store.values[layer]
            _attend_decodes(query[: batch.num_decodes], kept, sequences, shape, output[: batch.num_decodes])
        for piece in batch.pieces:
            rows = slice(piece.row, piece.row + piece.num_tokens)
            if piece.start == 0:
                keys, values = key[rows].transpose(0, 1), value[rows].transpose(0, 1)
            else:
                keys, values = _gather(layer, piece, shape.window, store)
            _prefill(query[rows], keys, values, piece.start + piece.num_tokens, shape, output[rows])
        return output

    def warm_up(self, store: TorchKvStore) -> None:
        """Compile, or load, what decodes in `store` will call, which no trial of a model does: attend to none of them.

        The first request would wait for it otherwise, for seconds on a machine that has never served.
        """
        for keys, values in zip(store.keys, store.values, strict=True):
            _attend_decodes(
                keys.new_empty(0, *keys.shape[2:]),
                (keys, values),
                (torch.empty(0, 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)),
                LayerShape(None, None, None, None),
                values.new_empty(0, *values.shape[2:]),
            )

    def attend_causal(self, tensors: Tensors, shape: LayerShape) -> torch.Tensor:
        """See `AttentionBackend.attend_causal`."""
        query, key, value = tensors
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        _prefill(query, key.transpose(0, 1), value.transpose(0, 1), len(query), shape, output)
        return output


def _attend_decodes(
    query: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor],
    sequences: tuple[torch.Tensor, torch.Tensor],
    shape: LayerShape,
    output: torch.Tensor,
) -> None:
    """`kept` are a layer's blocks of K and V, `sequences` the tables and lengths of those that decode."""
    kernel = decode_dot_kernel if _has_dot(query, *kept) else decode_kernel
    kernel.attend_decodes(
        as_array(query.contiguous()),
        *(as_array(blocks) for blocks in kept),
        *(numbers.numpy() for numbers in sequences),
        shape.window or 0,
        _scale(shape, query.shape[-1]),
        np.float32(shape.softcap or 0),
        _sinks(shape),
        as_array(output),
    )


def _has_dot(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    widths = keys.shape[-1], values.shape[-1]
    return (
        query.dtype is torch.bfloat16
        and numeric.has_bfloat16_unit()
        and not any(width % decode_dot_kernel.LANES for width in widths)
        and not keys.shape[1] % decode_dot_kernel.TOKENS
    )


def _prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    stop: int,
    shape: LayerShape,
    output: torch.Tensor,
) -> None:
    """`query`, `output` [tokens, heads, dim] end at position `stop`, as do `keys` and `values` [kv_heads, n, dim]."""
    kv_heads, group = keys.shape[0], query.shape[1] // keys.shape[0]
    values, products = values.contiguous(), _Products(keys)
    first_key = stop - keys.shape[1]
    window, softcap = shape.window or 0, np.float32(shape.softcap or 0)
    scale, sinks = _scale(shape, query.shape[-1]), _sinks(shape)
    # A weight of zero does not make a NaN harmless: a token must not hear of later ones by their tile.
    height = TILE if bool(values.sum(dtype=torch.float32).isfinite()) else 1
    for row in range(0, len(query), height):
        tile = query[row : row + height]
        first_query = stop - len(query) + row
        low = max(0, first_query - window + 1 - first_key) // PANEL * PANEL if window else 0
        high = first_query + len(tile) - first_key
        by_head = tile.view(len(tile), kv_heads, group, -1).permute(1, 2, 0, 3).reshape(kv_heads, -1, tile.shape[-1])
        scores = products.with_keys(by_head, low, high)
        weights = scores.new_empty(scores.shape, dtype=query.dtype)
        shape_4d = (kv_heads, group, len(tile), high - low)
        masked_softmax(
            as_array(scores.view(shape_4d)),
            first_query,
            first_key + low,
            window,
            scale,
            softcap,
            sinks,
            as_array(weights.view(shape_4d)),
        )
        result = torch.bmm(weights, values[:, low:high]).view(kv_heads, group, len(tile), -1)
        output[row : row + height].view(len(tile), kv_heads, group, -1).copy_(result.permute(2, 0, 1, 3))


class _Products:
    """Products of queries with a prompt's keys [kv_heads, n, dim], in float32 whatever the dtype is."""

    def __init__(self, keys: torch.Tensor) -> None:
        self._panels = self._wide = None
        dim = keys.shape[2]
        has_unit = numeric.has_bfloat16_unit() and torch.get_num_threads() == 1
        if has_unit and keys.dtype is torch.bfloat16 and dim % 2 == 0:
            missing = -keys.shape[1] % PANEL
            padded = torch.nn.functional.pad(keys, (0, 0, 0, missing)) if missing else keys
            shape = (keys.shape[0], -1, PANEL, dim // 2, 2)
            self._panels = padded.reshape(shape).transpose(2, 3).contiguous()
        else:
            self._wide = keys.float().contiguous()

    def with_keys(self, query: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """`query` [kv_heads, rows, dim] times keys `low` to `high`, [kv_heads, rows, keys]; `low` begins a panel."""
        if self._panels is None:
            assert self._wide is not None
            with _exact_products(query.dtype):
                return torch.bmm(query.float(), self._wide[:, low:high].transpose(1, 2))
        products = query.new_empty(*query.shape[:2], high - low, dtype=torch.float32)
        rows, dim = query.shape[1:]
        arrays = as_array(query.contiguous()), as_array(self._panels), products.numpy()
        multiply_heads(arrays[0], rows, dim, arrays[1], low // PANEL, arrays[2])
        return products


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of numbers that are bfloat16 run in the bfloat16 unit, which adds up in float32.

    Nothing is lost, since the numbers are what the unit would round them to; it is twice as fast as float32 proper.
    """
    backend: Any = torch.backends.mkldnn
    setting = backend.matmul
    before = setting.fp32_precision
    if dtype is torch.bfloat16:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _gather(layer: int, piece: Piece, window: int | None, store: TorchKvStore) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [kv_heads, n, dim] of the tokens that `piece` sees, from the first block that any of them lies in."""
    low = 0 if window is None else max(0, piece.start - window + 1) // store.block_size
    stop = piece.start + piece.num_tokens
    table = piece.table[low : -(-stop // store.block_size)]
    length = stop - low * store.block_size
    keys = store.keys[layer].index_select(0, table).flatten(0, 1)[:length]
    values = store.values[layer].index_select(0, table).flatten(0, 1)[:length]
    return keys.transpose(0, 1), values.transpose(0, 1)


def _scale(shape: LayerShape, dim: int) -> np.float32:
    return np.float32(dim**-0.5 if shape.scaling is None else shape.scaling)


def _sinks(shape: LayerShape) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return _NO_SINKS if shape.sinks is None else shape.sinks.float().numpy()
