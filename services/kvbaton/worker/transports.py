"""Which transports a worker's memory makes possible."""

import os
from collections.abc import Sequence

from kvbaton.engine.errors import StartupError
from kvbaton.handoff.choice import CUDA_IPC, SHARED_MEMORY
from kvbaton.handoff.sharing import PoolOpener, SharedPool
from kvbaton.worker.config import WorkerConfig
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


def shared_pools(config: WorkerConfig, runtime: WorkerRuntime) -> Sequence[SharedPool]:
    """What a worker that prefills offers besides gRPC. Raises StartupError when `--transport` is not among it."""
    return ()


def pool_openers(config: WorkerConfig, runtime: WorkerRuntime) -> Sequence[PoolOpener]:
    """What a worker that decodes can open besides gRPC. Raises StartupError when `--transport` is not among it."""
    return ()
