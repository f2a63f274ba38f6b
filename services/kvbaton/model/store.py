"""KV memory in torch tensors."""

from collections.abc import Sequence

import numpy as np
import torch

from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.kv_store import Buffer
from kvbaton.model.cpu.allocator import LargePages
from kvbaton.model.cuda.copies import KvCopies

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""torch's name of each KV dtype."""

# KV crosses process borders as plain integers of the element's width: numpy has no bfloat16.
_BITS = {"float32": (torch.int32, np.int32), "bfloat16": (torch.int16, np.int16)}


class TorchKvStore:
    """One K and one V tensor a layer, `[num_blocks, block_size, num_kv_heads, head_dim]`; implements `KvStore`.

    The memory is not initialised: a token's KV is whatever was last written at its slot. On a CUDA device there is one
    block more than asked for, which nobody has, for the rows that fill up a batch of fixed size.
    """

    def __init__(self, geometry: KvGeometry, num_blocks: int, block_size: int, device: torch.device) -> None:
        """Allocates the whole pool on `device`. Raises RuntimeError when it does not fit."""
        self._geometry = geometry
        self.block_size = block_size
        dtype = DTYPES[geometry.dtype]
        self.scratch_block = num_blocks
        self._copies = KvCopies(device, geometry.num_layers) if device.type == "cuda" else None
        shape = (num_blocks + (device.type == "cuda"), block_size)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        pages = LargePages()
        for layer in geometry.layers:
            for tensors, dim in ((self.keys, layer.k_head_dim), (self.values, layer.v_head_dim)):
                whole = (*shape, layer.num_kv_heads, dim)
                on_cpu = device.type == "cpu"
                tensors.append(pages.empty(whole, dtype) if on_cpu else torch.empty(whole, dtype=dtype, device=device))
        torch_bits, self._numpy_bits = _BITS[geometry.dtype]
        # [tokens, elements]: what a token has in a layer, as integers, K and V apart.
        self._rows = [
            (k.view(torch_bits).flatten(0, 1).flatten(1), v.view(torch_bits).flatten(0, 1).flatten(1))
            for k, v in zip(self.keys, self.values, strict=True)
        ]

    @property
    def geometry(self) -> KvGeometry:
        """The shape of one token's KV."""
        return self._geometry

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
        index, rows = self._slots(blocks, tokens), self._rows_of(layers)
        if self._copies is not None:
            parts = [self._copies.read(layers, rows, index)]
        else:
            parts = [part.index_select(0, index) for part in rows]
        return [part.numpy().reshape(-1).view(np.uint8).data for part in parts]

    def write(self, layers: range, blocks: Sequence[int], tokens: range, payload: Buffer) -> None:
        """See `KvStore.write`. Waits for a device's copy from the host."""
        index, rows = self._slots(blocks, tokens), self._rows_of(layers)
        incoming = np.frombuffer(payload, dtype=self._numpy_bits)
        if self._copies is not None:
            self._copies.write(rows, index, incoming)
            return
        offset = 0
        for part in rows:
            width = part.shape[1]
            part.numpy()[index.numpy()] = incoming[offset : offset + len(tokens) * width].reshape(len(tokens), width)
            offset += len(tokens) * width

    def _rows_of(self, layers: range) -> list[torch.Tensor]:
        return [rows for layer in layers for rows in self._rows[layer]]

    def _slots(self, blocks: Sequence[int], tokens: range) -> torch.Tensor:
        position = torch.arange(tokens.start, tokens.stop)
        table = torch.tensor(blocks)
        return table[position // self.block_size] * self.block_size + position % self.block_size
