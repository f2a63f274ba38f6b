"""A whole decoder layer of the common kind in ten calls, where the model's own modules make some fifty.

The kind is that of Llama: normalise, attend, add; normalise, transform, add. Heads may be normalised too (Qwen3), what
transforms may be anything (mixtures of experts). At small batches most of a step's time beside the weights is spent in
calls; this saves them.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from kvbaton.model.attention import PagedAttention
from kvbaton.model.cpu.kernels import rotate_heads
from kvbaton.model.cpu.linear import PackedLinear, is_packable
from kvbaton.model.cpu.modules import CompiledRmsNorm
from kvbaton.model.cpu.numeric import as_array

_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_NO_WEIGHT = np.empty(0, np.float32)


class CompiledLayer(nn.Module):
    """Takes the place of a `transformers` decoder layer that `looks_common` and gives the same."""

    def __init__(self, layer: Any, attention: PagedAttention) -> None:
        """`layer` has passed `looks_common` and a trial of the model with `attention`; parts may have been replaced."""
        super().__init__()
        own = layer.self_attn
        self._attention, self._index = attention, int(own.layer_idx)
        self._norm, self._mlp_norm, self._mlp = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
        self._projections = PackedLinear.of([own.q_proj, own.k_proj, own.v_proj])
        self._output = PackedLinear.of([own.o_proj])
        self._dim = int(own.head_dim)
        self._heads = own.q_proj.out_features // self._dim
        self._kv_heads = own.k_proj.out_features // self._dim
        norms = [getattr(own, name, None) for name in _NORMS]
        self._weights = [norm.weights if isinstance(norm, CompiledRmsNorm) else _NO_WEIGHT for norm in norms]
        self._epsilon = norms[0].epsilon if isinstance(norms[0], CompiledRmsNorm) else np.float32(0)
        # As the layer itself asked during its trial: some models keep it in places of their own.
        self._shape = attention.shapes[self._index]

    def forward(
        self, hidden_states: torch.Tensor, *, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> torch.Tensor:
        """`hidden_states` [1, tokens, hidden], `position_embeddings` [1, tokens, rotated] each; same shape back."""
        cos, sin = position_embeddings
        return self.compute(hidden_states[0], cos[0], sin[0])[None]

    def compute(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`hidden` [tokens, hidden], `cos` and `sin` [tokens, rotated]; returns [tokens, hidden].

        With `rows` only those are computed to the end, and returned: after a model's last layer nobody asks for the
        others, whose K and V are kept all the same.
        """
        projected = self._projections.forward(self._norm.forward(hidden))
        tokens, dim, norms = len(hidden), self._dim, self._weights
        query = hidden.new_empty(tokens, self._heads, dim)
        key = hidden.new_empty(tokens, self._kv_heads, dim)
        rotate_heads(
            as_array(projected),
            norms[0],
            norms[1],
            self._epsilon,
            as_array(cos),
            as_array(sin),
            as_array(query),
            as_array(key),
        )
        value = projected[:, -self._kv_heads * dim :].view(tokens, self._kv_heads, dim)
        attended = self._attention.attend(self._index, (query, key, value), self._shape).view(tokens, -1)
        if rows is not None:
            hidden, attended = hidden[rows], attended[rows]
        hidden = hidden + self._output.forward(attended)
        result: torch.Tensor = hidden + self._mlp(self._mlp_norm.forward(hidden))
        return result


def looks_common(layer: Any) -> bool:
    """Whether `layer` is made of the parts of the common kind. Whether it puts them together alike, a trial shows."""
    if {name for name, _ in layer.named_children()} != _CHILDREN:
        return False
    own = layer.self_attn
    names = {name for name, _ in own.named_children()}
    norms: list[Any] = [getattr(own, name) for name in _NORMS if name in names]
    return (
        names - set(_NORMS) == set(_PROJECTIONS)
        and all(is_packable(getattr(own, name)) for name in _PROJECTIONS)
        and all(isinstance(norm, CompiledRmsNorm) and len(norm.weights) == own.head_dim for norm in norms)
        and len(norms) in (0, len(_NORMS))
        and len({norm.epsilon for norm in norms}) <= 1
    )
