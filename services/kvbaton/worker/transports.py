"""Which transports a worker's memory makes possible."""

import os
import socket
from collections.abc import Sequence

from kvbaton.engine.errors import StartupError
from kvbaton.handoff.agreement import LinkOffer
from kvbaton.handoff.choice import AUTO, CUDA_IPC, GRPC, SHARED_MEMORY, LeftOut, Obstacle
from kvbaton.handoff.shared_memory import SharedMemoryOpener, SharedMemoryPool
from kvbaton.handoff.sharing import PoolOpener, SharedPool
from kvbaton.worker.config import WorkerConfig
from kvbaton.worker.cuda_sharing import cuda_pool_opener, cuda_shared_pool
from kvbaton.worker.runtime import WorkerRuntime


def check_transport(config: WorkerConfig) -> None:
    """Raise StartupError for a `--transport` that no worker with these options has: known before a model is loaded."""
    on_gpu = config.device.startswith("cuda")
    if config.transport == CUDA_IPC and not on_gpu:
        raise StartupError(f"--transport: cuda_ipc needs KV on a GPU, and --device is {config.device}")
    if config.transport == SHARED_MEMORY and on_gpu:
        raise StartupError(f"--transport: shared_memory needs KV in host memory, and --device is {config.device}")
    if config.transport == SHARED_MEMORY and not hasattr(os, "memfd_create"):
        raise StartupError("--transport: this system has no memory files, which shared_memory needs")


def link_offer(config: WorkerConfig, runtime: WorkerRuntime, *, encoded: bool) -> LinkOffer:
    """What a worker that prefills offers, whose KV may be `encoded` on its way, which only gRPC does.

    Raises StartupError when `--transport` is not among it.
    """
    pools: list[SharedPool] = []
    cuda = cuda_shared_pool(runtime.store)
    if cuda is not None:
        pools.append(cuda)
    if runtime.store.shared is not None:
        pools.append(SharedMemoryPool(runtime.store.shared))
    left_out: list[LeftOut] = []
    if encoded:
        left_out = [LeftOut(pool.transport, Obstacle.ENCODED, expected=True) for pool in pools]
        pools = []
    problem = "KV is encoded on its way" if encoded else "the KV pool cannot be shared with other processes"
    _check(config, [pool.transport for pool in pools], problem)
    return LinkOffer(runtime.incarnation, runtime.host, config.transport, pools, left_out)


def pool_openers(config: WorkerConfig, runtime: WorkerRuntime) -> Sequence[PoolOpener]:
    """What a worker that decodes can open besides gRPC. Raises StartupError when `--transport` is not among it."""
    openers: list[PoolOpener] = []
    cuda = cuda_pool_opener(runtime.store, runtime.incarnation)
    if cuda is not None:
        openers.append(cuda)
    if not config.device.startswith("cuda") and hasattr(socket, "SO_PEERCRED"):
        openers.append(SharedMemoryOpener(runtime.store))
    _check(config, [opener.transport for opener in openers], "the memory of other processes cannot be opened")
    return openers


def _check(config: WorkerConfig, transports: Sequence[str], problem: str) -> None:
    if config.transport not in (AUTO, GRPC, *transports):
        raise StartupError(f"--transport: {config.transport} is not to be had: {problem}; the log may say why")
