"""KV memory in torch tensors."""

from collections.abc import Sequence

import numpy as np
import torch

from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.kv_store import KvStore, Landing
from kvbaton.engine.runs import slot_runs
from kvbaton.model.cpu.allocator import LargePages
from kvbaton.model.cuda.copies import KvCopies
from kvbaton.model.encoded_store import EncodedStore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""torch's name of each KV dtype."""

# KV crosses process borders as plain integers of the element's width: numpy has no bfloat16.
_BITS = {"float32": torch.int32, "bfloat16": torch.int16}


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

    def put(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store freshly computed KV: `slots` [tokens], `key` and `value` [tokens, num_kv_heads, head_dim]."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)

    def mark_written(self, layer: int) -> None:
        """Engine's thread: `put` was called for KV of `layer` that is to be read; another thread's `read` awaits it."""
        if self._copies is not None:
            self._copies.mark_written(layer)

    def encoded(self, encoding: str) -> KvStore:
        """See `KvStore.encoded`."""
        return EncodedStore(self, encoding) if encoding else self

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
