"""Stand-ins for memory, model and services: small, observable, and able to fail or to wait when a test says so."""

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from kvbaton.engine.core import Engine
from kvbaton.engine.errors import UnavailableError
from kvbaton.engine.geometry import DTYPE_BYTES, KvGeometry, LayerGeometry
from kvbaton.engine.kv_store import ForeignPool, KvStore, Landing, Pending, Reading, SharedMemory
from kvbaton.engine.output import SampledToken, StepOutput
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.pool_layout import PoolLayout
from kvbaton.engine.scheduler import Batch, Limits, Scheduler
from kvbaton.handoff import wire
from kvbaton.handoff.codec import crc32c
from kvbaton.handoff.landing import fill
from kvbaton.rpc.serving import Registration, serving
from kvbaton.v1 import kv_transfer_pb2, prefill_pb2, types_pb2, worker_pb2
from kvbaton.v1.decode_pb2_grpc import DecodeServiceServicer, add_DecodeServiceServicer_to_server
from kvbaton.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from kvbaton.v1.prefill_pb2_grpc import PrefillServiceServicer, add_PrefillServiceServicer_to_server
from kvbaton.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server

if TYPE_CHECKING:
    from kvbaton.worker.runtime import WorkerRuntime

PATIENCE = 10.0
"""Seconds after which a test that waits for an event gives up."""

GEOMETRY = KvGeometry((LayerGeometry(2, 4, 4), LayerGeometry(2, 4, 4), LayerGeometry(1, 6, 2)), "float32")
"""Three layers of two shapes, the last with V narrower than K."""

BLOCK_SIZE = 4


def fingerprint(**changes: str) -> types_pb2.ModelFingerprint:
    """The fakes' model, or one that differs in some fields."""
    values = {
        "architecture": "FakeForCausalLM",
        "weights_digest": "00ff",
        "kv_dtype": "float32",
        "rounded_digest": "0f",
        **changes,
    }
    return types_pb2.ModelFingerprint(**values)


def model_info(**changes: Any) -> types_pb2.ModelInfo:
    """What a worker with the fakes' model tells."""
    values = {
        "name": "fake",
        "fingerprint": fingerprint(),
        "kv_geometry": wire.geometry_to_proto(GEOMETRY),
        "vocab_size": 100,
        "max_model_len": 64,
        **changes,
    }
    return types_pb2.ModelInfo(**values)


class FakeStore:
    """A `KvStore` over one bytearray for each of K and V of each layer."""

    def __init__(self, geometry: KvGeometry = GEOMETRY, num_blocks: int = 32, block_size: int = BLOCK_SIZE) -> None:
        self.geometry = geometry
        self.shared: SharedMemory | None = None
        self.block_size = block_size
        size = DTYPE_BYTES[geometry.dtype]
        # (width of a token's row, rows), K and V in turn
        self.memory = []
        for layer in geometry.layers:
            widths = [layer.num_kv_heads * dim * size for dim in (layer.k_head_dim, layer.v_head_dim)]
            self.memory.append([(width, bytearray(width * num_blocks * block_size)) for width in widths])
        self.before_write: Callable[[], None] = lambda: None
        """Called when a payload is about to be written, on the writer's thread."""
        self.writes: list[tuple[range, range]] = []
        self.still_landing: Pending | None = None
        """What a device has still to do before KV that has come is in its blocks."""
        self.fences: list[str] = []
        """Which of the engine and of what lands was told to follow the other."""

    def read(self, layers: range, blocks: Sequence[int], tokens: range) -> list[memoryview]:
        return [
            memoryview(b"".join(rows[at * width : (at + 1) * width] for at in self._slots(blocks, tokens)))
            for layer in layers
            for width, rows in self.memory[layer]
        ]

    def landing(self, layers: range, blocks: Sequence[int], tokens: range) -> Landing:
        self.before_write()
        self.writes.append((layers, tokens))
        return Landing(
            [
                memoryview(rows)[at * width : (at + 1) * width]
                for layer in layers
                for width, rows in self.memory[layer]
                for at in self._slots(blocks, tokens)
            ],
            lambda: None,
        )

    def checksum(self, layers: range, blocks: Sequence[int], tokens: range) -> int:
        return crc32c(self.read(layers, blocks, tokens))

    def map_foreign(self, descriptor: int, layout: PoolLayout) -> ForeignPool:
        raise UnavailableError("a fake maps nothing")

    def encoded(self, encoding: str) -> KvStore:
        if not encoding:
            return self
        # Without torch, and without numba, as long as nobody asks for it.
        from kvbaton.model.encoded_store import EncodedStore

        return EncodedStore(self, encoding)

    def read_ahead(self, layers: range, blocks: Sequence[int], tokens: range) -> Reading:
        return Reading(self.read(layers, blocks, tokens), None, lambda: None)

    def written(self, layers: range) -> Pending | None:
        return None

    def landed(self) -> Pending | None:
        return self.still_landing

    def landings_follow_engine(self) -> None:
        self.fences.append("landings follow")

    def engine_follows_landings(self) -> None:
        self.fences.append("engine follows")

    def fill(self, layer: int, blocks: Sequence[int], tokens: range) -> None:
        """Put fresh random KV there, as a forward pass would."""
        fill(self.landing(range(layer, layer + 1), blocks, tokens), secrets.token_bytes(self.span(layer, len(tokens))))

    def span(self, layer: int, num_tokens: int) -> int:
        return self.geometry.span_bytes(layer, layer + 1, num_tokens)

    def content(self, blocks: Sequence[int], tokens: range) -> bytes:
        """The KV of `tokens` in all layers."""
        return b"".join(self.read(range(self.geometry.num_layers), blocks, tokens))

    def _slots(self, blocks: Sequence[int], tokens: range) -> list[int]:
        return [blocks[token // self.block_size] * self.block_size + token % self.block_size for token in tokens]


class FakeRunner:
    """An engine's `Runner` whose tokens count up from 10: the token at position p of a sequence is 10 + p."""

    def __init__(self, store: FakeStore | None = None, on_layer: Callable[[Batch, int], None] | None = None) -> None:
        self._store = store
        self._on_layer = on_layer
        self.before_run: Callable[[Batch], None] = lambda batch: None
        """Called at the beginning of each step, on the engine's thread; it may wait or raise."""

    def run(self, batch: Batch) -> StepOutput:
        self.before_run(batch)
        for layer in range(self._store.geometry.num_layers if self._store else 0):
            for piece in batch.slices:
                assert self._store is not None
                self._store.fill(layer, piece.request.blocks, range(piece.start, piece.start + piece.num_tokens))
            if self._on_layer is not None:
                self._on_layer(batch, layer)
        samplers = [piece for piece in batch.slices if piece.samples]
        return StepOutput([SampledToken(10 + piece.start + piece.num_tokens) for piece in samplers])


class Gate:
    """A place in another thread where a test can hold it: it passes `permits` times and then waits."""

    def __init__(self, permits: int = 0) -> None:
        self.reached = threading.Semaphore(0)
        self._open = threading.Semaphore(permits)

    def __call__(self, *_: object) -> None:
        self.reached.release()
        assert self._open.acquire(timeout=PATIENCE), "nobody opened the gate"

    def open(self, times: int = 1) -> None:
        self._open.release(times)

    async def wait_reached(self) -> None:
        """Until the other thread has come here once more."""
        assert await asyncio.to_thread(self.reached.acquire, timeout=PATIENCE), "nobody came to the gate"


def make_engine(runner: FakeRunner, limits: Limits, num_blocks: int = 32, max_model_len: int = 64) -> Engine:
    """An engine around a fake runner; 2 is EOS."""
    return Engine(Scheduler(BlockPool(num_blocks, BLOCK_SIZE), limits, frozenset({2}), max_model_len), runner)


class FakeTokenizer:
    """What a detokenizer needs of a tokenizer: the text of token 12 is "<12>"."""

    special_token_ids: frozenset[int] = frozenset()

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"<{token_id}>" for token_id in token_ids)


def make_runtime(
    store: FakeStore, runner: FakeRunner, limits: Limits, num_blocks: int = 32, tokenizer: Any = None
) -> "WorkerRuntime":
    """A worker's parts without a model. Imports torch."""
    from kvbaton.worker.admission import Admission
    from kvbaton.worker.engine_thread import EngineThread
    from kvbaton.worker.runtime import WorkerRuntime

    engine = EngineThread(make_engine(runner, limits, num_blocks), asyncio.get_running_loop())
    return WorkerRuntime(
        incarnation="1",
        model=model_info(),
        host=types_pb2.HostIdentity(boot_id="boot"),
        store=store,  # type: ignore[arg-type]
        num_blocks=num_blocks,
        tokenizer=tokenizer,
        admission=Admission(model_info(), tokenizer),
        limits=limits,
        engine=engine,
    )


def header(ticket: bytes, tokens: range, **changes: Any) -> kv_transfer_pb2.KvHeader:
    """The header of a first attempt with the fakes' model."""
    values = {
        "ticket": ticket,
        "attempt": 1,
        "fingerprint": fingerprint(),
        "geometry": wire.geometry_to_proto(GEOMETRY),
        "token_start": tokens.start,
        "token_stop": tokens.stop,
        "transports": ["grpc"],
        **changes,
    }
    return kv_transfer_pb2.KvHeader(**values)


def frame_info(number: int, layers: range, tokens: range, payload: bytes, attempt: int = 1) -> Any:
    """What identifies a frame."""
    return kv_transfer_pb2.FrameInfo(
        number=number,
        attempt=attempt,
        layer_start=layers.start,
        layer_stop=layers.stop,
        token_start=tokens.start,
        token_stop=tokens.stop,
        crc32c=crc32c([payload]),
    )


def token_event(first_index: int, *token_ids: int, finish: Any = 0, text: str = "") -> types_pb2.TokenEvent:
    return types_pb2.TokenEvent(first_index=first_index, token_ids=token_ids, text=text, finish_reason=finish)


Script = Callable[[Any, Any], Awaitable[None]]
"""What a fake service does of a request: `script(request, context)`, answering with `context.write`."""


class Scripted:
    """The common part of the fake services: it notes requests, metadata and cancellations, and follows its script."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.cancelled = asyncio.Event()

    async def follow(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            await self.script(request, context)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def _linked(request: Any) -> Any:
    link = worker_pb2.PeerLink(endpoint=request.endpoint, transport="grpc", reason="there is no other")
    return prefill_pb2.ConnectPeerResponse(link=link)


class FakePrefill(Scripted, PrefillServiceServicer):
    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.connected: list[Any] = []
        self.connect: Callable[[Any], Awaitable[Any]] = _linked
        """What it answers to ConnectPeer."""

    async def Prefill(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self.follow(request, context)

    async def ConnectPeer(self, request: Any, context: Any) -> Any:
        self.connected.append(request)
        return await self.connect(request)

    def registration(self) -> Registration:
        return Registration("kvbaton.v1.PrefillService", lambda s: add_PrefillServiceServicer_to_server(self, s))


class FakeDecode(Scripted, DecodeServiceServicer):
    async def Decode(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self.follow(request, context)

    def registration(self) -> Registration:
        return Registration("kvbaton.v1.DecodeService", lambda s: add_DecodeServiceServicer_to_server(self, s))


class FakeWorkerStatus(Scripted, WorkerServiceServicer):
    async def WatchStatus(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self.follow(request, context)

    async def GetStatus(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def SetLimits(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    def registration(self) -> Registration:
        return Registration("kvbaton.v1.WorkerService", lambda s: add_WorkerServiceServicer_to_server(self, s))


class FakeRouter(Scripted, InferenceServiceServicer):
    """A router whose unary answers are attributes."""

    tokenized: Any = None
    listed: Any = None

    async def Generate(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self.follow(request, context)

    async def Tokenize(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return self.tokenized

    async def ListModels(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return self.listed

    def registration(self) -> Registration:
        return Registration("kvbaton.v1.InferenceService", lambda s: add_InferenceServiceServicer_to_server(self, s))


@asynccontextmanager
async def served(*services: Any) -> AsyncIterator[str]:
    """A server of fakes on a free port of this machine; its host:port."""
    registrations = [service.registration() for service in services]
    async with serving(registrations, "127.0.0.1", 0, grace_seconds=0) as server:
        yield server.address


async def forever(*_: Any) -> None:
    """A script that ends only by cancellation."""
    await asyncio.Event().wait()
