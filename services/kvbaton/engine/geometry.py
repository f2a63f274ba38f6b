"""The shape of the KV cache: what one token leaves behind in every layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
"""Size of one element, in bytes, of each KV dtype that kvbaton can hold and move."""

AS_IT_IS = ""
"""The encoding of KV that travels as it lies in the sender's memory."""

ENCODING_BYTES = {"bfloat16": 2, "int8": 1, "float8": 1}
"""Size of one element, in bytes, of each encoding that KV can be converted to for its way."""

SCALED = frozenset({"int8", "float8"})
"""Encodings with a scale for each token and head, of K and of V."""

SCALE_BYTES = 2
"""Size of a scale, which is a bfloat16."""


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """KV of one layer: K is `[tokens, num_kv_heads, k_head_dim]`, V is `[tokens, num_kv_heads, v_head_dim]`."""

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    window: int | None = None
    """Tokens that a token sees, itself included; None for all."""

    @property
    def elements_per_token(self) -> int:
        """Elements of K and V together that one token takes in this layer."""
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim)


@dataclass(frozen=True)
class KvGeometry:
    """KV of a whole model, layers in model order."""

    layers: tuple[LayerGeometry, ...]
    dtype: str
    """Of its elements in memory."""
    encoding: str = AS_IT_IS
    """What they are converted to; all sizes are then those of what travels."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {sorted(DTYPE_BYTES)}")
        if self.encoding not in (AS_IT_IS, *ENCODING_BYTES):
            raise ValueError(f"encoding {self.encoding!r} is not one of {sorted(ENCODING_BYTES)}")
        if not self.layers:
            raise ValueError("a model without attention layers has no KV")

    @property
    def num_layers(self) -> int:
        """Layers that keep KV."""
        return len(self.layers)

    @cached_property
    def window(self) -> int | None:
        """The largest sliding window of a layer; None when no layer has one."""
        return max((layer.window for layer in self.layers if layer.window is not None), default=None)

    @cached_property
    def layer_token_bytes(self) -> tuple[int, ...]:
        """Bytes that one token takes, by layer."""
        size = ENCODING_BYTES.get(self.encoding) or DTYPE_BYTES[self.dtype]
        scale = 2 * SCALE_BYTES if self.encoding in SCALED else 0
        return tuple(layer.elements_per_token * size + layer.num_kv_heads * scale for layer in self.layers)

    @cached_property
    def token_bytes(self) -> int:
        """Bytes that one token takes in all layers."""
        return sum(self.layer_token_bytes)

    def span_bytes(self, layer_start: int, layer_stop: int, num_tokens: int) -> int:
        """Bytes of `num_tokens` tokens in layers `[layer_start, layer_stop)`."""
        return num_tokens * sum(self.layer_token_bytes[layer_start:layer_stop])

    def groups(self) -> list[tuple[int, LayerGeometry]]:
        """Runs of equal consecutive layers, as (number of layers, their geometry)."""
        return list(self._groups)

    @cached_property
    def _groups(self) -> tuple[tuple[int, LayerGeometry], ...]:
        # Compared at the beginning of each transfer.
        runs: list[tuple[int, LayerGeometry]] = []
        for layer in self.layers:
            if runs and runs[-1][1] == layer:
                runs[-1] = (runs[-1][0] + 1, layer)
            else:
                runs.append((1, layer))
        return tuple(runs)

    @classmethod
    def from_groups(cls, groups: Sequence[tuple[int, LayerGeometry]], dtype: str) -> "KvGeometry":
        """Inverse of `groups`. Raises ValueError for an unknown dtype or no layers."""
        return cls(tuple(layer for count, layer in groups for _ in range(count)), dtype)

    def encoded(self, encoding: str) -> "KvGeometry":
        """The same KV on its way in `encoding`. Raises ValueError for an unknown one."""
        return replace(self, encoding=encoding)
