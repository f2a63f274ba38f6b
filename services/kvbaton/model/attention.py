"""Reference attention over paged KV: right everywhere, for everything, by scaled_dot_product_attention over gathered
blocks. It enters any `transformers` decoder through its AttentionInterface.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from kvbaton.engine.geometry import LayerGeometry
from kvbaton.model.ragged import RaggedBatch
from kvbaton.model.store import TorchKvStore

_NAMES = (f"kvbaton_{number}" for number in itertools.count())

# Arguments that models pass and that change nothing here: there is no dropout when serving, the cache is ours, and
# what else a forward pass should put out is not attention's concern.
_HARMLESS = frozenset({"dropout", "position_ids", "cache_position", "is_causal", "use_cache"})


@dataclass(slots=True)
class _Shape:
    """What varies between layers and models besides the tensors."""

    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None  # [heads]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, shape: _Shape
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


@dataclass(slots=True)
class PagedAttention:
    """The function that a model's layers call. It keeps K and V itself, in the store, and reads them from there.

    Without a store it is in its trial: it computes plain causal attention and notes each layer's geometry.
    """

    store: TorchKvStore | None = None
    batch: RaggedBatch | None = None
    on_layer: Callable[[int], None] | None = None
    """Called with the layer's index when its KV of the current batch is in the store."""
    seen: dict[int, LayerGeometry] = field(default_factory=dict)
    """Layers that came through during the trial."""
    unknown_arguments: set[str] = field(default_factory=set)
    """Arguments that a model passed and that this function does not understand."""
    name: str = field(default_factory=lambda: next(_NAMES))
    """What to pass as `attn_implementation`."""

    def register(self) -> None:
        """Make the function known to `transformers`, which keeps it for the life of the process."""
        AttentionInterface.register(self.name, self)
        AttentionMaskInterface.register(self.name, lambda *_, **__: None)

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **arguments: Any,
    ) -> tuple[torch.Tensor, None]:
        """`query` [1, heads, tokens, d], `key`, `value` [1, kv_heads, tokens, d]; returns [1, tokens, heads, d_v]."""
        shape = _Shape(
            scaling=arguments.pop("scaling", None),
            window=arguments.pop("sliding_window", None),
            softcap=arguments.pop("softcap", None),
            sinks=arguments.pop("s_aux", None),
        )
        if self.store is None or self.batch is None:
            arguments["attention_mask"] = attention_mask
            if False in (arguments.get("is_causal"), getattr(module, "is_causal", True)):
                arguments["a view of later tokens"] = True
            return self._trial(module.layer_idx, (query, key, value), shape, arguments), None
        layer = module.layer_idx
        self.store.put(layer, self.batch.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        if self.on_layer is not None:
            self.on_layer(layer)
        output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        if self.batch.num_decodes:
            output[: self.batch.num_decodes] = self._decode(layer, query, shape)
        for piece in self.batch.pieces:
            rows = slice(piece.row, piece.row + piece.num_tokens)
            if piece.start == 0:
                keys, values = key[:, :, rows], value[:, :, rows]
            else:
                keys, values = self._gather(layer, piece.table[None], piece.start + piece.num_tokens)
            mask = self.batch.prefill_mask(piece, shape.window)
            result = attend(query[:, :, rows], keys, values, mask, shape)
            output[rows] = result[0].transpose(0, 1)
        return output[None], None

    def _trial(
        self,
        layer: int,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        shape: _Shape,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        query, key, value = tensors
        self.seen[layer] = LayerGeometry(key.shape[1], key.shape[-1], value.shape[-1])
        self.unknown_arguments |= {
            name
            for name, value in arguments.items()
            if value is not None and name not in _HARMLESS and not name.startswith("output_")
        }
        return attend(query, key, value, None, shape).transpose(1, 2)

    def _decode(self, layer: int, query: torch.Tensor, shape: _Shape) -> torch.Tensor:
        assert self.batch is not None
        count, tables = self.batch.num_decodes, self.batch.decode_tables
        assert tables is not None
        keys, values = self._gather(layer, tables, self.batch.longest_decode)
        mask = self.batch.decode_mask(shape.window)
        # Behind the mask lies whatever was last written there. A weight of zero does not make a NaN harmless.
        unseen = ~mask.transpose(-1, -2)
        keys, values = keys.masked_fill(unseen, 0), values.masked_fill(unseen, 0)
        queries = query[0, :, :count].transpose(0, 1).unsqueeze(2)
        return attend(queries, keys, values, mask, shape).squeeze(2)

    def _gather(self, layer: int, tables: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` tokens of each of `tables` [n, blocks], as [n, kv_heads, length, d] for K and V."""
        assert self.store is not None
        keys = self.store.keys[layer][tables].flatten(1, 2)[:, :length]
        values = self.store.values[layer][tables].flatten(1, 2)[:, :length]
        return keys.transpose(1, 2), values.transpose(1, 2)
