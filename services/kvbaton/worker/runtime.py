"""Everything a worker has besides its services: model, memory, engine, tokenizer, identity."""

import asyncio
import logging
import os
import secrets
from dataclasses import dataclass

import torch

from kvbaton.engine.core import Engine
from kvbaton.engine.errors import StartupError
from kvbaton.engine.geometry import KvGeometry
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.scheduler import Limits, Scheduler
from kvbaton.handoff.host import host_identity
from kvbaton.handoff.wire import geometry_to_proto
from kvbaton.model.loader import LoadedModel, load_model
from kvbaton.model.runner import LayerListener, ModelRunner
from kvbaton.model.store import TorchKvStore
from kvbaton.rpc.config import parse_size
from kvbaton.text.bundled import model_name, resolve_model
from kvbaton.text.tokenizer import Tokenizer, load_tokenizer
from kvbaton.v1 import types_pb2 as types
from kvbaton.worker.admission import Admission
from kvbaton.worker.config import WorkerConfig
from kvbaton.worker.engine_thread import EngineThread

logger = logging.getLogger(__name__)

MAX_BLOCKS = 1 << 20
"""Most blocks a pool has, however small they are: each costs some bookkeeping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRuntime:
    """One worker's parts, made once at start."""

    incarnation: str
    model: types.ModelInfo
    host: types.HostIdentity
    store: TorchKvStore
    num_blocks: int
    tokenizer: Tokenizer | None
    admission: Admission
    limits: Limits
    """Those that the engine starts with."""
    engine: EngineThread


async def load_runtime(config: WorkerConfig, limits: Limits, on_layer: LayerListener | None) -> WorkerRuntime:
    """Load the model and allocate the pool, in a thread: signals must be heard meanwhile. Call it before serving.

    Raises as `build_runtime`.
    """
    return await asyncio.to_thread(build_runtime, config, limits, on_layer, asyncio.get_running_loop())


def build_runtime(
    config: WorkerConfig, limits: Limits, on_layer: LayerListener | None, loop: asyncio.AbstractEventLoop
) -> WorkerRuntime:
    """Load the model and allocate the pool, for an engine that answers to `loop`. Takes seconds to minutes.

    Raises StartupError for a model that is missing, broken or not servable, or memory that does not hold a block.
    """
    parse_size(config.kv_memory, "kv-memory")
    torch.set_num_threads(config.threads)
    path = resolve_model(config.model)
    loaded = load_model(path, config.dtype, config.device)
    num_blocks = blocks_in(config.kv_memory, loaded.geometry, config.block_size)
    store = _allocate(loaded, num_blocks, config)
    scheduler = Scheduler(BlockPool(num_blocks, config.block_size), limits, loaded.eos_token_ids, loaded.max_model_len)
    engine = Engine(scheduler, ModelRunner(loaded, store, on_layer))
    tokenizer = load_tokenizer(path)
    info = model_info(loaded, config.served_model_name or model_name(path))
    logger.info(
        "model %s (%s, %s): %d KV blocks of %d tokens, %.0f MiB",
        info.name,
        loaded.architecture,
        loaded.geometry.dtype,
        num_blocks,
        config.block_size,
        num_blocks * config.block_size * loaded.geometry.token_bytes / 2**20,
    )
    return WorkerRuntime(
        incarnation=secrets.token_hex(8),
        model=info,
        host=host_identity(_gpu_uuids(loaded.device)),
        store=store,
        num_blocks=num_blocks,
        tokenizer=tokenizer,
        admission=Admission(info, tokenizer),
        limits=limits,
        engine=EngineThread(engine, loop),
    )


def blocks_in(kv_memory: str, geometry: KvGeometry, block_size: int) -> int:
    """Blocks that a memory size such as "1GiB" holds. Raises StartupError when it is not even one."""
    block_bytes = geometry.token_bytes * block_size
    num_blocks = parse_size(kv_memory, "kv-memory") // block_bytes
    if num_blocks < 1:
        raise StartupError(f"--kv-memory: {kv_memory} does not hold one block of {block_bytes} bytes")
    if num_blocks > MAX_BLOCKS:
        logger.warning(
            "--kv-memory: %s holds %d blocks, of which %d are used, the most that a pool has; a larger --block-size "
            "makes use of more",
            kv_memory,
            num_blocks,
            MAX_BLOCKS,
        )
    return min(num_blocks, MAX_BLOCKS)


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def model_info(loaded: LoadedModel, name: str) -> types.ModelInfo:
    """What the worker tells about its model."""
    return types.ModelInfo(
        name=name,
        fingerprint=types.ModelFingerprint(
            architecture=loaded.architecture,
            weights_digest=loaded.weights_digest,
            kv_dtype=loaded.geometry.dtype,
        ),
        kv_geometry=geometry_to_proto(loaded.geometry),
        vocab_size=loaded.vocab_size,
        max_model_len=loaded.max_model_len,
        eos_token_ids=sorted(loaded.eos_token_ids),
    )


def _allocate(loaded: LoadedModel, num_blocks: int, config: WorkerConfig) -> TorchKvStore:
    pool_bytes = num_blocks * config.block_size * loaded.geometry.token_bytes
    # Linux grants memory that it does not have, and kills the process when it is used.
    if loaded.device.type == "cpu" and pool_bytes > physical_memory():
        has = f"this machine has {physical_memory() / 2**30:.1f} GiB"
        raise StartupError(f"--kv-memory: a pool of {pool_bytes / 2**30:.1f} GiB is too large; {has}")
    try:
        return TorchKvStore(loaded.geometry, num_blocks, config.block_size, loaded.device)
    except RuntimeError as error:
        raise StartupError(f"--kv-memory: {config.kv_memory} cannot be allocated on {config.device}") from error


def _gpu_uuids(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return ()
    return (str(torch.cuda.get_device_properties(device).uuid),)
