"""Runs a scheduler's batches on a `transformers` decoder."""

from collections.abc import Callable

import torch

from kvbaton.engine.output import StepOutput
from kvbaton.engine.scheduler import Batch
from kvbaton.model import ragged
from kvbaton.model.loader import LoadedModel
from kvbaton.model.step_output import rows_to_keep, step_output
from kvbaton.model.store import TorchKvStore

LayerListener = Callable[[Batch, int], None]
"""Told, on the engine's thread, that a layer's KV of a batch is in the store."""


class ModelRunner:
    """Forward pass over ragged batches, KV in a paged store, sampling; implements the engine's `Runner`."""

    def __init__(self, loaded: LoadedModel, store: TorchKvStore, on_layer: LayerListener | None = None) -> None:
        """Takes over the model's attention: a loaded model serves one runner."""
        self._forward = loaded.forward
        self._attention = loaded.attention
        self._attention.store = store
        self._store = store
        self._device = loaded.device
        self._eos_token_ids = loaded.eos_token_ids
        self._on_layer = on_layer

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepOutput:
        """See `Runner.run`. Raises what torch raises, out-of-memory included."""
        tensors = ragged.build(batch, self._store.block_size, self._device)
        self._attention.batch = tensors
        if self._on_layer is not None:
            listener = self._on_layer
            self._attention.on_layer = lambda layer: listener(batch, layer)
        rows = rows_to_keep(batch, tensors.sampled_rows)
        logits = self._forward(tensors.token_ids, tensors.positions, rows)
        return step_output(batch, logits, self._eos_token_ids)
