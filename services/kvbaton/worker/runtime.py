"""Everything a worker has besides its services: model, memory, engine, tokenizer, identity."""

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass

import torch

from kvbaton.engine.core import Engine
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.scheduler import Limits, Scheduler
from kvbaton.handoff.host import host_identity
from kvbaton.handoff.wire import geometry_to_proto
from kvbaton.model.loader import LoadedModel, load_model
from kvbaton.model.memory import readable
from kvbaton.model.runner import LayerListener, ModelRunner
from kvbaton.model.store import TorchKvStore
from kvbaton.text.bundled import model_name, resolve_model
from kvbaton.text.tokenizer import Tokenizer, load_tokenizer
from kvbaton.v1 import types_pb2 as types
from kvbaton.worker.admission import Admission
from kvbaton.worker.config import WorkerConfig
from kvbaton.worker.engine_thread import EngineThread
from kvbaton.worker.kv_memory import allocate, check_size, num_blocks_for

logger = logging.getLogger(__name__)


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
    check_size(config.kv_memory)
    torch.set_num_threads(config.threads)
    begin = time.monotonic()
    path = resolve_model(config.model)
    loaded = load_model(path, config.dtype, config.device, config.trust_remote_code)
    num_blocks = num_blocks_for(config, loaded)
    # Whoever reports layers hands them over, perhaps to a process beside it.
    store = allocate(config, loaded, num_blocks, shared=on_layer is not None)
    store.warm_up()
    pool, window = BlockPool(num_blocks, store.block_size), loaded.geometry.window
    scheduler = Scheduler(pool, limits, loaded.eos_token_ids, loaded.max_model_len, window)
    engine = Engine(scheduler, ModelRunner(loaded, store, on_layer))
    tokenizer = load_tokenizer(path)
    info = model_info(loaded, tokenizer, config.served_model_name or model_name(path))
    logger.info(
        "model %s (%s, %s) loaded in %.1f s on %s: weights %s, KV pool %s (%d blocks of %d tokens)",
        info.name,
        loaded.architecture,
        loaded.geometry.dtype,
        time.monotonic() - begin,
        config.device,
        readable(loaded.weights_bytes),
        readable(num_blocks * store.block_size * loaded.geometry.token_bytes),
        num_blocks,
        store.block_size,
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


def model_info(loaded: LoadedModel, tokenizer: Tokenizer | None, name: str) -> types.ModelInfo:
    """What the worker tells about its model."""
    return types.ModelInfo(
        name=name,
        fingerprint=types.ModelFingerprint(
            architecture=loaded.architecture,
            weights_digest=loaded.weights_digest,
            kv_dtype=loaded.geometry.dtype,
            rounded_digest=loaded.rounded_digest,
        ),
        kv_geometry=geometry_to_proto(loaded.geometry),
        vocab_size=loaded.vocab_size,
        max_model_len=loaded.max_model_len,
        eos_token_ids=sorted(loaded.eos_token_ids),
        vocabulary_digest=tokenizer.digest if tokenizer is not None else "",
    )


def _gpu_uuids(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return ()
    return (str(torch.cuda.get_device_properties(device).uuid),)
