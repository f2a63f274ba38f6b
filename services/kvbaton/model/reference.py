"""Reference attention: right everywhere, for everything, by scaled_dot_product_attention over gathered blocks."""

import torch
from torch.nn import functional

from kvbaton.model.attention import LayerShape, Tensors
from kvbaton.model.ragged import RaggedBatch
from kvbaton.model.store import TorchKvStore


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, shape: LayerShape
) -> torch.Tensor:
    """Attention of `query` [n, heads, q, d] over `key`, `value` [n, kv_heads, k, d]; returns [n, heads, q, d_v].

    `mask` [n or 1, 1, q, k] is True where a query may look; None means causal with as many queries as keys.
    """
    if shape.softcap is None and shape.sinks is None:
        return functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=shape.scaling, enable_gqa=True
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scale = query.shape[-1] ** -0.5 if shape.scaling is None else shape.scaling
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if shape.softcap is not None:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if shape.sinks is not None:
        # A sink is one more key, with a learned score and no value (gpt-oss).
        sink = shape.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[-2]]
    return weights.to(value.dtype) @ value


class ReferenceAttention:
    """An `AttentionBackend` for any device that torch has."""

    def attend(
        self, layer: int, tensors: Tensors, shape: LayerShape, batch: RaggedBatch, store: TorchKvStore
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        query, key, value = tensors
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        if batch.num_decodes:
            output[: batch.num_decodes] = _decode(layer, query, shape, batch, store)
        for piece in batch.pieces:
            rows = slice(piece.row, piece.row + piece.num_tokens)
            if piece.start == 0:
                keys, values = key[rows].transpose(0, 1)[None], value[rows].transpose(0, 1)[None]
            else:
                keys, values = _gather(layer, piece.table[None], piece.start + piece.num_tokens, store)
            mask = batch.prefill_mask(piece, shape.window)
            if mask is not None and shape.window is not None:
                # What no query of the piece sees may be no number at all; see `_decode`.
                low = max(0, piece.start - shape.window + 1)
                keys, values, mask = keys[:, :, low:], values[:, :, low:], mask[..., low:]
            result = attend(query[rows].transpose(0, 1)[None], keys, values, mask, shape)
            output[rows] = result[0].transpose(0, 1)
        return output

    def attend_causal(self, tensors: Tensors, shape: LayerShape) -> torch.Tensor:
        """See `AttentionBackend.attend_causal`."""
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in tensors)
        return attend(query, key, value, None, shape)[0].transpose(0, 1)


def _decode(
    layer: int, query: torch.Tensor, shape: LayerShape, batch: RaggedBatch, store: TorchKvStore
) -> torch.Tensor:
    assert batch.decode_tables is not None
    keys, values = _gather(layer, batch.decode_tables, batch.longest_decode, store)
    mask = batch.decode_mask(shape.window)
    # Behind the mask lies whatever was last written there. A weight of zero does not make a NaN harmless.
    unseen = ~mask.transpose(-1, -2)
    keys, values = keys.masked_fill(unseen, 0), values.masked_fill(unseen, 0)
    return attend(query[: batch.num_decodes].unsqueeze(2), keys, values, mask, shape).squeeze(2)


def _gather(layer: int, tables: torch.Tensor, length: int, store: TorchKvStore) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `length` tokens of each of `tables` [n, blocks], as [n, kv_heads, length, d] for K and V."""
    keys = store.keys[layer][tables].flatten(1, 2)[:, :length]
    values = store.values[layer][tables].flatten(1, 2)[:, :length]
    return keys.transpose(1, 2), values.transpose(1, 2)
