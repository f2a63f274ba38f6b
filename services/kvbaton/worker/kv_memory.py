"""How large a worker's KV pool is, and its allocation."""

import logging

from kvbaton.engine.errors import StartupError
from kvbaton.engine.geometry import KvGeometry
from kvbaton.model.cuda.kernel import PAGE_MULTIPLE
from kvbaton.model.loader import LoadedModel
from kvbaton.model.memory import Memory, check_fits, memory_of, readable
from kvbaton.model.store import PROBE_BYTES, TorchKvStore
from kvbaton.rpc.config import parse_size
from kvbaton.worker.config import WorkerConfig

logger = logging.getLogger(__name__)

AUTO = "auto"

CPU_BLOCK_SIZE = 16
"""Tokens of a block where nothing asks for more: prefixes are shared by whole blocks."""

MAX_BLOCKS = 1 << 20
"""Most blocks a pool has, however small they are: each costs some bookkeeping."""

CUDA_PART = 0.9
"""What `auto` plans with of a device's memory; the rest is for activations and the allocator's holes."""

CPU_PART = 0.5
"""What `auto` plans with of a host's memory: other processes live there too."""

CPU_MOST = 4 << 30
"""Bytes that `auto` takes on a CPU at the most."""


def block_size_of(config: WorkerConfig) -> int:
    """Tokens of a block that `--block-size` asks for, or that suit the device."""
    return config.block_size or (PAGE_MULTIPLE if config.device.startswith("cuda") else CPU_BLOCK_SIZE)


def check_size(kv_memory: str) -> None:
    """Raise StartupError when the option is neither a size nor "auto": that can be told before a model is loaded."""
    if kv_memory != AUTO:
        parse_size(kv_memory, "kv-memory")


def num_blocks_for(config: WorkerConfig, loaded: LoadedModel) -> int:
    """Blocks of the pool that `--kv-memory` asks for. Raises StartupError when it is not even one."""
    block_size = block_size_of(config)
    if config.kv_memory == AUTO:
        size = auto_bytes(memory_of(loaded.device), loaded.weights_bytes, loaded.device.type, config.memory_share)
        # Not more than there can be: nobody asked for the rest.
        size = min(size, MAX_BLOCKS * block_size * loaded.geometry.token_bytes)
    else:
        size = parse_size(config.kv_memory, "kv-memory")
    num_blocks = blocks_in(size, loaded.geometry, block_size)
    if num_blocks * block_size < loaded.max_model_len:
        logger.warning(
            "the KV pool holds %d tokens and the model's context %d: longer requests are refused",
            num_blocks * block_size,
            loaded.max_model_len,
        )
    return num_blocks


def auto_bytes(memory: Memory, weights_bytes: int, device_type: str, share: float) -> int:
    """The pool that `auto` takes of a device's `memory`, measured once the weights are loaded.

    A worker's share is one of the whole memory, its weights included, so that workers which start at the same time on
    one device take no more together than one would alone; what is available now bounds it in any case.
    """
    part = CUDA_PART if device_type == "cuda" else CPU_PART
    planned = int(memory.total * part * share) - weights_bytes
    size = min(planned, int(memory.available * part))
    return max(0, size if device_type == "cuda" else min(size, CPU_MOST))


def blocks_in(size: int, geometry: KvGeometry, block_size: int) -> int:
    """Blocks that `size` bytes hold. Raises StartupError when it is not even one."""
    block_bytes = geometry.token_bytes * block_size
    num_blocks = size // block_bytes
    if num_blocks < 1:
        raise StartupError(f"--kv-memory: {size} bytes do not hold one block of {block_bytes} bytes")
    if num_blocks > MAX_BLOCKS:
        logger.warning(
            "--kv-memory: %s holds %d blocks, of which %d are used, the most that a pool has; a larger --block-size "
            "makes use of more",
            readable(size),
            num_blocks,
            MAX_BLOCKS,
        )
    return min(num_blocks, MAX_BLOCKS)


def allocate(config: WorkerConfig, loaded: LoadedModel, num_blocks: int, *, shared: bool = False) -> TorchKvStore:
    """The pool's memory, for other processes to map if it is to be `shared` and that is possible; if not, a warning.

    Raises StartupError when the device does not have that much.
    """
    block_size = block_size_of(config)
    size = num_blocks * block_size * loaded.geometry.token_bytes + (PROBE_BYTES if shared else 0)
    # Shared memory is no file's cache to the kernel: what is written of it is not counted as available either.
    check_fits("--kv-memory: the pool takes", size, memory_of(loaded.device), loaded.device)
    try:
        store = TorchKvStore(loaded.geometry, num_blocks, block_size, loaded.device, shared=shared)
    except RuntimeError as error:
        raise StartupError(f"--kv-memory: {readable(size)} cannot be allocated on {config.device}: {error}") from error
    if shared and loaded.device.type == "cpu" and store.shared is None:
        logger.warning("KV cannot be handed over by shared memory: %s", store.memory.obstacle)
    return store
