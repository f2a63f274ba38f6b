"""How attention over paged KV enters any `transformers` decoder: by its AttentionInterface. Backends compute it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from kvbaton.engine.geometry import LayerGeometry
from kvbaton.model.ragged import RaggedBatch
from kvbaton.model.store import TorchKvStore

_NAMES = (f"kvbaton_{number}" for number in itertools.count())

# Arguments that models pass and that change nothing here: there is no dropout when serving, the cache is ours, and
# what else a forward pass should put out is not attention's concern.
_HARMLESS = frozenset({"dropout", "position_ids", "cache_position", "is_causal", "use_cache"})


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value of some tokens, [tokens, heads, dim] each."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerShape:
    """What varies between layers and models besides the tensors."""

    scaling: float | None
    """Factor of the scores; None for k_dim ** -0.5."""
    window: int | None
    """Tokens that a token sees, itself included; None for all."""
    softcap: float | None
    """Scores become softcap * tanh(score / softcap); None for no cap."""
    sinks: torch.Tensor | None
    """[heads]: one more score in each softmax, without a value."""


class AttentionBackend(Protocol):
    """Computes attention of a step's tokens, whose own KV is in the store already."""

    def attend(
        self,
        layer: int,
        tensors: Tensors,
        shape: LayerShape,
        batch: RaggedBatch,
        store: TorchKvStore,
    ) -> torch.Tensor:
        """Attention of the step's tokens; returns [tokens, heads, v_dim]."""
        ...

    def attend_causal(self, tensors: Tensors, shape: LayerShape) -> torch.Tensor:
        """The same for one whole sequence, without a store and without a window."""
        ...


@dataclass(slots=True)
class PagedAttention:
    """The function that a model's layers call. It keeps K and V itself, in the store, and reads them from there.

    Without a store it is in its trial: it computes plain causal attention and notes each layer's geometry.
    """

    backend: AttentionBackend
    store: TorchKvStore | None = None
    batch: RaggedBatch | None = None
    on_layer: Callable[[int], None] | None = None
    """Called with the layer's index when its KV of the current batch is in the store."""
    seen: dict[int, LayerGeometry] = field(default_factory=dict)
    """Layers that came through during the trial."""
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    """What they asked for."""
    unknown_arguments: set[str] = field(default_factory=set)
    """Arguments that a model passed and that this function does not understand."""
    name: str = field(default_factory=lambda: next(_NAMES))
    """What to pass as `attn_implementation`."""

    def register(self) -> None:
        """Make the function known to `transformers`, which keeps it for the life of the process.

        It makes no mask for names that AttentionMaskInterface does not know. To find out which mask it should make it
        would look at the positions, and on a GPU wait for them.
        """
        AttentionInterface.register(self.name, self)

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
        shape = LayerShape(
            scaling=arguments.pop("scaling", None),
            window=arguments.pop("sliding_window", None),
            softcap=arguments.pop("softcap", None),
            sinks=arguments.pop("s_aux", None),
        )
        tensors = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        if self.store is None:
            arguments["attention_mask"] = attention_mask
            if False in (arguments.get("is_causal"), getattr(module, "is_causal", True)):
                arguments["a view of later tokens"] = True
            self._note(module.layer_idx, tensors, shape, arguments)
        return self.attend(module.layer_idx, tensors, shape)[None], None

    def attend(self, layer: int, tensors: Tensors, shape: LayerShape) -> torch.Tensor:
        """Keep a layer's K and V and compute its attention; see `AttentionBackend.attend`."""
        if self.store is None or self.batch is None:
            return self.backend.attend_causal(tensors, shape)
        self.store.put(layer, self.batch.slots, tensors[1], tensors[2])
        if self.on_layer is not None:
            self.store.mark_written(layer)
            self.on_layer(layer)
        return self.backend.attend(layer, tensors, shape, self.batch, self.store)

    def _note(self, layer: int, tensors: Tensors, shape: LayerShape, arguments: dict[str, Any]) -> None:
        _, key, value = tensors
        self.seen[layer] = LayerGeometry(key.shape[1], key.shape[-1], value.shape[-1], shape.window)
        self.shapes[layer] = shape
        self.unknown_arguments |= {
            name
            for name, value in arguments.items()
            if value is not None and name not in _HARMLESS and not name.startswith("output_")
        }
