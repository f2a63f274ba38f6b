"""Runs a scheduler's batches on a `transformers` decoder."""

from collections.abc import Callable

import torch

from kvbaton.engine.output import StepOutput
from kvbaton.engine.scheduler import Batch
from kvbaton.model import ragged
from kvbaton.model.cpu.attention import CpuAttention
from kvbaton.model.cuda.attention import CudaAttention
from kvbaton.model.cuda.graphs import CudaCapture, DecodeGraphs
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
        self._graphs: DecodeGraphs | None = None
        if isinstance(loaded.attention.backend, CpuAttention):
            loaded.attention.backend.warm_up(store)
        if loaded.device.type == "cuda":
            capture = CudaCapture(loaded.device)
            self._graphs = DecodeGraphs(loaded.forward, loaded.attention, store, loaded.max_model_len, capture)

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepOutput:
        """See `Runner.run`. Raises what torch raises, out-of-memory included."""
        logits = self._replayed(batch)
        if logits is None:
            logits = self._computed(batch)
        return step_output(batch, logits, self._eos_token_ids)

    def _replayed(self, batch: Batch) -> torch.Tensor | None:
        backend = self._attention.backend
        if self._graphs is None or not (isinstance(backend, CudaAttention) and backend.may_be_captured):
            return None
        return self._graphs.logits(batch)

    def _computed(self, batch: Batch) -> torch.Tensor:
        tensors = ragged.build(batch, self._store.block_size, self._device)
        self._attention.batch = tensors
        listener = self._on_layer
        if listener is not None:
            self._attention.on_layer = lambda layer: listener(batch, layer)
        rows = rows_to_keep(batch, tensors.sampled_rows)
        return self._forward(tensors.token_ids, tensors.positions, rows)
