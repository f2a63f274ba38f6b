"""A whole model's forward pass in one loop, for models whose layers are all `CompiledLayer`s."""

from typing import Any

import torch

from kvbaton.model.cpu.layer import CompiledLayer
from kvbaton.model.forward import plain_forward, trial_of


class CompiledDecoder:
    """Embedding, layers, norm and head, without what a model's own forward does around them at each step."""

    def __init__(self, model: Any) -> None:
        """`model` is a `transformers` causal language model with decoder, layers, norm and output embeddings."""
        decoder = model.get_decoder()
        self._embed, self._rotary = decoder.embed_tokens, decoder.rotary_emb
        self._layers: list[CompiledLayer] = list(decoder.layers)
        self._norm, self._head = decoder.norm, model.get_output_embeddings()

    def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits [len(rows), vocab] after the tokens in `rows` of `token_ids` and `positions` [1, tokens]."""
        hidden: torch.Tensor = self._embed(token_ids)[0]
        cos, sin = self._rotary(hidden, positions)
        for layer in self._layers[:-1]:
            hidden = layer.compute(hidden, cos[0], sin[0])
        hidden = self._layers[-1].compute(hidden, cos[0], sin[0], rows)
        logits: torch.Tensor = self._head(self._norm(hidden))
        return logits


@torch.inference_mode()
def compiled_decoder(model: Any) -> CompiledDecoder | None:
    """The loop for `model`, when it gives exactly what the model itself gives; None for a model that does more."""
    decoder = model.get_decoder()
    parts = ("embed_tokens", "rotary_emb", "layers", "norm")
    if any(not hasattr(decoder, part) for part in parts) or model.get_output_embeddings() is None:
        return None
    if any(type(layer) is not CompiledLayer for layer in decoder.layers):
        return None
    # Of every token: how many rows a product has may round them differently.
    trial, loop = trial_of(model), CompiledDecoder(model)
    return loop if torch.equal(loop(*trial), plain_forward(model)(*trial)) else None
