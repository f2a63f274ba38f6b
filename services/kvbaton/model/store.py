"""KV memory in torch tensors."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.kv_store import Landing, SharedMemory
from kvbaton.engine.pool_layout import lay_out
from kvbaton.engine.runs import slot_runs
from kvbaton.model.cuda.copies import KvCopies
from kvbaton.model.pool_memory import pool_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""torch's name of each KV dtype."""

PROBE_BYTES = 4 << 20
"""What a pool that others may map has for probes: enough for a copy's speed to show."""

# KV crosses process borders as plain integers of the element's width: numpy has no bfloat16.
_BITS = {"float32": torch.int32, "bfloat16": torch.int16}


class TorchKvStore:
    """One K and one V tensor a layer, `[num_blocks, block_size, num_kv_heads, head_dim]`; implements `KvStore`.

    The memory is not initialised: a token's KV is whatever was last written at its slot. On a CUDA device there is one
    block more than asked for, which nobody has, for the rows that fill up a batch of fixed size.
    """

    def __init__(
        self, geometry: KvGeometry, num_blocks: int, block_size: int, device: torch.device, *, shared: bool = False
    ) -> None:
        """Allocates the whole pool on `device`, where other processes can map it if it is to be `shared`.

        Raises RuntimeError when it does not fit.
        """
        self._geometry = geometry
        self.block_size = block_size
        self.scratch_block = num_blocks
        self._copies = KvCopies(device, geometry.num_layers) if device.type == "cuda" else None
        capacity = num_blocks + (device.type == "cuda")
        self.layout = lay_out(geometry, capacity, block_size, PROBE_BYTES if shared else 0)
        self.memory = pool_memory(self.layout.num_bytes, device, shared)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for number, layer in enumerate(geometry.layers):
            shape = (capacity, block_size, layer.num_kv_heads)
            self.keys.append(self._tensor(self.layout.k_offsets[number], (*shape, layer.k_head_dim)))
            self.values.append(self._tensor(self.layout.v_offsets[number], (*shape, layer.v_head_dim)))
        bits = _BITS[geometry.dtype]
        # [tokens, elements]: what a token has in a layer, as integers, K and V apart.
        self._rows = [
            (k.view(bits).flatten(0, 1).flatten(1), v.view(bits).flatten(0, 1).flatten(1))
            for k, v in zip(self.keys, self.values, strict=True)
        ]
        self._bytes = [tuple(map(_bytes_of, pair)) for pair in self._rows] if self._copies is None else []

    @property
    def geometry(self) -> KvGeometry:
        """The shape of one token's KV."""
        return self._geometry

    @property
    def shared(self) -> SharedMemory | None:
        """See `KvStore.shared`."""
        if self.memory.descriptor is None:
            return None
        probe = self.memory.tensor[self.layout.probe_offset :][: self.layout.probe_bytes]
        return SharedMemory(self.layout, self.memory.descriptor, probe.numpy().data)

    def put(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store freshly computed KV: `slots` [tokens], `key` and `value` [tokens, num_kv_heads, head_dim]."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)

    def mark_written(self, layer: int) -> None:
        """Engine's thread: `put` was called for KV of `layer` that is to be read; another thread's `read` awaits it."""
        if self._copies is not None:
            self._copies.mark_written(layer)

    def read(self, layers: range, blocks: Sequence[int], tokens: range) -> list[memoryview]:
        """See `KvStore.read`. Waits for a device's copy to the host."""
        if self._copies is None:
            return self._parts(layers, blocks, tokens)
        host = self._copies.read(layers, self._rows_of(layers), self._slots(blocks, tokens))
        return [host.numpy().view(np.uint8).data]

    def landing(self, layers: range, blocks: Sequence[int], tokens: range) -> Landing:
        """See `KvStore.landing`. To finish one waits for a device's copy from the host."""
        if self._copies is None:
            return Landing(self._parts(layers, blocks, tokens), _nothing)
        copies, rows, slots = self._copies, self._rows_of(layers), self._slots(blocks, tokens)
        pinned = copies.staging(rows, slots)
        return Landing([pinned.numpy().view(np.uint8).data], lambda: copies.write(rows, slots, pinned))

    def _tensor(self, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = DTYPES[self._geometry.dtype]
        return self.memory.tensor[offset:][: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def _parts(self, layers: range, blocks: Sequence[int], tokens: range) -> list[memoryview]:
        runs = slot_runs(blocks, tokens, self.block_size)
        return [
            memory[run.start * width : run.stop * width]
            for layer in layers
            for width, memory in self._bytes[layer]
            for run in runs
        ]

    def _rows_of(self, layers: range) -> list[torch.Tensor]:
        return [rows for layer in layers for rows in self._rows[layer]]

    def _slots(self, blocks: Sequence[int], tokens: range) -> torch.Tensor:
        position = torch.arange(tokens.start, tokens.stop)
        table = torch.tensor(blocks)
        return table[position // self.block_size] * self.block_size + position % self.block_size


def _bytes_of(rows: torch.Tensor) -> tuple[int, memoryview]:
    """Bytes of a row, and the memory of all of them."""
    return rows.shape[1] * rows.element_size(), rows.numpy().reshape(-1).view(np.uint8).data


def _nothing() -> None:
    """What is left to do where a payload was received in its place."""
