"""The cuda_ipc transport's two halves, over a CUDA without a GPU: what is offered, refused, mapped, copied, let go."""

import asyncio
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from crc32c import crc32c

from kvbaton.engine.errors import UnavailableError
from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.engine.pool_layout import lay_out
from kvbaton.handoff.choice import Obstacle
from kvbaton.handoff.sharing import ForeignPool, PoolOpener, SharedPool
from kvbaton.model.cuda.copies import DevicePool, KvCopies
from kvbaton.model.cuda.device_memory import allocate
from kvbaton.model.cuda.runtime import CudaError
from kvbaton.model.pool_memory import PoolMemory
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.worker import cuda_sharing
from kvbaton.worker.cuda_sharing import CudaPoolOpener, CudaSharedPool, cuda_pool_opener, cuda_shared_pool
from support.cudart import FakeStream, Gpus, Process

GEOMETRY = KvGeometry((LayerGeometry(2, 4, 4), LayerGeometry(1, 6, 2)), "bfloat16")
LAYERS = range(2)
GPUS = ["GPU-a", "GPU-b", "GPU-c"]
LINK = bytes(16)


class Worker:
    """One process's pool on one GPU."""

    def __init__(self, gpus: Gpus, number: int = 0, num_blocks: int = 6) -> None:
        self.process, self.number = Process(gpus), number
        layout = lay_out(GEOMETRY, num_blocks, 4, probe_bytes=128)
        memory = allocate(self.process.runtime(), torch.device("cpu", number), layout.num_bytes)
        memory.copy_(torch.arange(len(memory)).mul(7 + number).to(torch.uint8))
        self.pool = DevicePool(memory, layout, GEOMETRY)
        self.copies = KvCopies(self.pool, FakeStream("reads", []), FakeStream("landings", []))

    def offer(self) -> CudaSharedPool:
        handle = self.process.runtime().export(self.number, self.pool.memory.data_ptr())
        return CudaSharedPool(self.pool.layout, handle, GPUS[self.number], self.copies)

    def hello(self) -> pb.LinkHello:
        hello = pb.LinkHello(incarnation="sender", transports=["cuda_ipc"])
        self.offer().describe(hello)
        return hello

    def opener(self) -> CudaPoolOpener:
        return CudaPoolOpener(self.process.runtime(), self.copies, GPUS, ("receiver", self.number))


@pytest.fixture
def gpus() -> Gpus:
    return Gpus(3)


def test_both_halves_are_what_links_ask_for(gpus: Gpus) -> None:
    sender, receiver = Worker(gpus), Worker(gpus)
    shared: SharedPool = sender.offer()
    opener: PoolOpener = receiver.opener()
    foreign: ForeignPool = opener.open(sender.hello(), LINK)
    assert shared.transport == opener.transport == "cuda_ipc"
    assert opener.invite(LINK) == ""
    asyncio.run(shared.hand_over(pb.LinkWelcome()))
    foreign.close()
    opener.forget(LINK)


def test_kv_goes_from_the_senders_blocks_to_ours(gpus: Gpus) -> None:
    sender, receiver = Worker(gpus), Worker(gpus, num_blocks=9)
    foreign = receiver.opener().open(sender.hello(), LINK)
    assert foreign.copy(LAYERS, [5, 0], range(2, 8), [8, 1]) is None
    receiver.copies.landed().wait()
    assert receiver.copies.read(LAYERS, [8, 1], range(2, 8)) == sender.copies.read(LAYERS, [5, 0], range(2, 8))


def test_a_probe_finds_the_pattern_and_its_time(gpus: Gpus) -> None:
    sender, receiver = Worker(gpus), Worker(gpus)
    foreign = receiver.opener().open(sender.hello(), LINK)
    shared = sender.offer()
    assert shared.probe_bytes == 128
    pattern = bytes(range(128))
    shared.write_probe(pattern)
    found, seconds = foreign.probe(128)
    assert found == crc32c(pattern)
    assert seconds > 0


def test_a_mapping_goes_with_its_link_even_when_the_device_has_failed(
    gpus: Gpus, caplog: pytest.LogCaptureFixture
) -> None:
    sender, receiver = Worker(gpus), Worker(gpus)
    foreign = receiver.opener().open(sender.hello(), LINK)
    receiver.process.fail["cudaIpcCloseMemHandle"] = 700
    with caplog.at_level(logging.WARNING):
        foreign.close()
    assert "cudaIpcCloseMemHandle" in caplog.text


def test_another_gpu_is_mapped_where_it_is_when_ours_can_read_it(gpus: Gpus) -> None:
    sender, receiver = Worker(gpus, number=1), Worker(gpus, number=0)
    assert receiver.opener().obstacle(sender.hello()) == Obstacle.NO_PEER_ACCESS
    gpus.peers.add((0, 1))
    assert receiver.opener().obstacle(sender.hello()) == ""
    receiver.opener().open(sender.hello(), LINK).close()
    opened = [device for name, device in receiver.process.calls if name == "cudaIpcOpenMemHandle"]
    assert opened == [1]


def _change(**values: Any) -> Callable[[pb.LinkHello], None]:
    def change(hello: pb.LinkHello) -> None:
        for name, value in values.items():
            setattr(hello, name, value)

    return change


def _more_blocks(hello: pb.LinkHello) -> None:
    hello.layout.num_blocks = 1 << 30


def _no_layout(hello: pb.LinkHello) -> None:
    hello.ClearField("layout")


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        (_change(incarnation="receiver"), Obstacle.SAME_PROCESS),
        (_change(gpu_uuid="GPU-z"), Obstacle.NO_PEER_ACCESS),
        (_change(gpu_uuid=""), Obstacle.NO_PEER_ACCESS),
        (_change(cuda_ipc_handle=b""), "cuda_ipc_handle: 0 bytes where 64 must be"),
        (_change(cuda_ipc_handle=bytes(65)), "cuda_ipc_handle: 65 bytes where 64 must be"),
        (_more_blocks, "layout.k_offsets[0]: bytes"),
        (_no_layout, "layout: 0 blocks of 0 tokens"),
    ],
)
def test_what_speaks_against_it_is_told_before_anything_is_mapped(
    gpus: Gpus, change: Callable[[pb.LinkHello], None], obstacle: str
) -> None:
    sender, receiver = Worker(gpus), Worker(gpus)
    hello = sender.hello()
    change(hello)
    assert receiver.opener().obstacle(hello).startswith(obstacle)
    with pytest.raises(UnavailableError):
        receiver.opener().open(hello, LINK)
    assert "cudaIpcOpenMemHandle" not in receiver.process.names


def test_what_cuda_says_against_it_is_an_obstacle_too(gpus: Gpus) -> None:
    sender, receiver = Worker(gpus, number=1), Worker(gpus)
    receiver.process.fail["cudaDeviceCanAccessPeer"] = 101
    assert "cudaDeviceCanAccessPeer" in receiver.opener().obstacle(sender.hello())


def test_a_process_that_maps_its_own_memory_hears_why_not(gpus: Gpus) -> None:
    worker = Worker(gpus)
    with pytest.raises(UnavailableError, match="cannot be mapped: cudaIpcOpenMemHandle: invalid resource handle"):
        worker.opener().open(worker.hello(), LINK)


def test_a_sender_that_says_more_than_it_has_is_not_believed(gpus: Gpus) -> None:
    sender, receiver = Worker(gpus), Worker(gpus)
    hello = sender.hello()
    hello.layout.num_bytes = 1 << 40
    with pytest.raises(UnavailableError, match="bytes of an allocation that has"):
        receiver.opener().open(hello, LINK)
    assert receiver.process.opened == []


def store_of(worker: Worker, obstacle: str = "") -> Any:
    """What the factories look at of a store."""
    memory = PoolMemory(worker.pool.memory, obstacle=obstacle)
    return SimpleNamespace(device_copies=worker.copies, memory=memory, layout=worker.pool.layout)


def test_a_pool_on_a_gpu_is_offered_and_others_are_opened(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = Worker(gpus), Worker(gpus)
    monkeypatch.setattr(cuda_sharing, "gpu_uuid", lambda device: GPUS[device.index])
    monkeypatch.setattr(cuda_sharing, "visible_gpus", lambda: GPUS)
    monkeypatch.setattr(cuda_sharing, "cuda_runtime", sender.process.runtime)
    # The pool's device is a CPU here, which has no number unless it is asked for.
    for worker in (sender, receiver):
        monkeypatch.setattr(KvCopies, "device", torch.device("cpu", worker.number))
    store = store_of(sender)
    store.memory = SimpleNamespace(
        obstacle="", tensor=SimpleNamespace(device=torch.device("cpu", 0), data_ptr=sender.pool.memory.data_ptr)
    )
    shared = cuda_shared_pool(store)
    monkeypatch.setattr(cuda_sharing, "cuda_runtime", receiver.process.runtime)
    opener = cuda_pool_opener(store_of(receiver), "receiver")
    assert shared is not None
    assert opener is not None
    hello = pb.LinkHello(incarnation="sender")
    shared.describe(hello)
    assert hello.gpu_uuid == "GPU-a"
    assert opener.obstacle(hello) == ""
    opener.open(hello, LINK).close()


def test_a_pool_on_a_cpu_has_no_part_in_it() -> None:
    store: Any = SimpleNamespace(device_copies=None)
    assert cuda_shared_pool(store) is None
    assert cuda_pool_opener(store, "receiver") is None


def test_where_cuda_cannot_export_there_is_a_reason(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(gpus)

    def missing() -> Any:
        raise CudaError("libcudart is not to be found")

    monkeypatch.setattr(cuda_sharing, "cuda_runtime", missing)
    with caplog.at_level(logging.WARNING):
        assert cuda_shared_pool(store_of(worker, obstacle="no runtime was found")) is None
        assert cuda_shared_pool(store_of(worker)) is None
        assert cuda_pool_opener(store_of(worker), "receiver") is None
    assert "by CUDA IPC: no runtime was found" in caplog.text
    assert caplog.text.count("libcudart is not to be found") == 2
