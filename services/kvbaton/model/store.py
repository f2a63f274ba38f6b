"""KV memory in torch tensors."""

import math
from collections.abc import Sequence

import torch
from crc32c import crc32c

from kvbaton.engine.errors import UnavailableError
from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.kv_store import KvStore, Landing, Pending, Reading, SharedMemory
from kvbaton.engine.pool_layout import PoolLayout, lay_out
from kvbaton.engine.runs import slot_runs
from kvbaton.model.cuda.copies import DevicePool, DeviceStream, KvCopies
from kvbaton.model.encoded_store import EncodedStore
from kvbaton.model.foreign_pool import ForeignMemory
from kvbaton.model.host_pool import HostPool, warm_up
from kvbaton.model.pool_memory import pool_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""torch's name of each KV dtype."""

PROBE_BYTES = 4 << 20
"""What a pool that others may map has for probes: enough for a copy's speed to show."""


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
        capacity = num_blocks + (device.type == "cuda")
        self.layout = lay_out(geometry, capacity, block_size, PROBE_BYTES if shared else 0)
        self.memory = pool_memory(self.layout.num_bytes, device, shared)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for number, layer in enumerate(geometry.layers):
            shape = (capacity, block_size, layer.num_kv_heads)
            self.keys.append(self._tensor(self.layout.k_offsets[number], (*shape, layer.k_head_dim)))
            self.values.append(self._tensor(self.layout.v_offsets[number], (*shape, layer.v_head_dim)))
        self._copies: KvCopies | None = None
        self._bytes: list[list[tuple[int, memoryview]]] = []
        self._host: HostPool | None = None
        if device.type == "cuda":
            pool = DevicePool(self.memory.tensor, self.layout, geometry)
            self._copies = KvCopies(pool, DeviceStream(device), DeviceStream(device))
        else:
            self._host = HostPool(self.memory.tensor.data_ptr(), self.layout, geometry)
            self._bytes = [list(map(_bytes_of, pair)) for pair in zip(self.keys, self.values, strict=True)]

    @property
    def device_copies(self) -> KvCopies | None:
        """What copies KV on the pool's own device; None on a CPU."""
        return self._copies

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

    def warm_up(self) -> None:
        """Compile, or load, what hand-offs need, which takes seconds on a machine that has never served."""
        if self._host is not None:
            warm_up()

    def encoded(self, encoding: str) -> KvStore:
        """See `KvStore.encoded`."""
        return EncodedStore(self, encoding) if encoding else self

    def read(self, layers: range, blocks: Sequence[int], tokens: range) -> list[memoryview]:
        """See `KvStore.read`. Waits for a device's copy to the host."""
        if self._copies is None:
            return self._parts(layers, blocks, tokens)
        return [self._copies.read(layers, blocks, tokens)]

    def checksum(self, layers: range, blocks: Sequence[int], tokens: range) -> int:
        """See `KvStore.checksum`. Waits for a device's copy to the host."""
        if self._host is None:
            return crc32c(self.read(layers, blocks, tokens)[0])
        return self._host.checksum(layers, blocks, tokens)

    def map_foreign(self, descriptor: int, layout: PoolLayout) -> ForeignMemory:
        """See `KvStore.map_foreign`."""
        if self._host is None:
            raise UnavailableError("this worker's KV is not in host memory")
        return ForeignMemory(descriptor, layout, self._geometry, self._host)

    def read_ahead(self, layers: range, blocks: Sequence[int], tokens: range) -> Reading:
        """See `KvStore.read_ahead`."""
        if self._copies is None:
            return Reading(self._parts(layers, blocks, tokens), None, _nothing)
        return self._copies.read_ahead(layers, blocks, tokens)

    def written(self, layers: range) -> Pending | None:
        """See `KvStore.written`."""
        return None if self._copies is None else self._copies.written(layers)

    def landing(self, layers: range, blocks: Sequence[int], tokens: range) -> Landing:
        """See `KvStore.landing`. To finish one queues a device's copy from the host."""
        if self._copies is None:
            return Landing(self._parts(layers, blocks, tokens), _nothing)
        return self._copies.landing(layers, blocks, tokens)

    def landed(self) -> Pending | None:
        """See `KvStore.landed`."""
        return None if self._copies is None else self._copies.landed()

    def landings_follow_engine(self) -> None:
        """See `KvStore.landings_follow_engine`."""
        if self._copies is not None:
            self._copies.landings_follow_engine()

    def engine_follows_landings(self) -> None:
        """See `KvStore.engine_follows_landings`."""
        if self._copies is not None:
            self._copies.engine_follows_landings()

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


def _bytes_of(tensor: torch.Tensor) -> tuple[int, memoryview]:
    """Bytes that a token has in `tensor`, and the memory of all of them. numpy has no bfloat16, but it has bytes."""
    memory = tensor.view(torch.uint8).numpy().reshape(-1)
    return memory.size // (tensor.shape[0] * tensor.shape[1]), memory.data


def _nothing() -> None:
    """What is left to do where a payload was received in its place."""
