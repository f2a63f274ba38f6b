"""On a GPU: KV between two processes' pools over CUDA IPC, and between a pool and frames through pinned memory."""

import random
from collections.abc import Iterator

import pytest
import torch
from crc32c import crc32c

from kvbaton.engine.errors import TransferRejectedError, UnavailableError
from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.handoff.choice import Obstacle
from kvbaton.model.cuda.foreign import gpu_uuid
from kvbaton.model.store import TorchKvStore
from kvbaton.v1 import kv_transfer_pb2 as pb
from kvbaton.worker.cuda_sharing import CudaPoolOpener, cuda_pool_opener, cuda_shared_pool
from support.cuda_exporter import Exporter, read

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GEOMETRIES = {
    "alike": KvGeometry((LayerGeometry(2, 64, 64),) * 4, "bfloat16"),
    "mixed": KvGeometry((LayerGeometry(2, 64, 32), LayerGeometry(1, 10, 6), LayerGeometry(1, 10, 6)), "float32"),
}
GEOMETRY = GEOMETRIES["alike"]
LAYERS = range(GEOMETRY.num_layers)
LINK = bytes(16)


def opener_of(store: TorchKvStore) -> CudaPoolOpener:
    opener = cuda_pool_opener(store, "importer")
    assert opener is not None
    return opener


def landed(store: TorchKvStore) -> None:
    pending = store.landed()
    assert pending is not None
    pending.wait()
    assert pending.done()


@pytest.fixture(scope="module")
def exporter() -> Iterator[Exporter]:
    with Exporter(GEOMETRY, num_blocks=40, block_size=256) as process:
        yield process


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
@pytest.mark.parametrize("block_size", [16, 256])
def test_what_is_copied_from_another_process_is_its_kv_to_the_byte(geometry: str, block_size: int) -> None:
    shape = GEOMETRIES[geometry]
    store = TorchKvStore(shape, 80, 64, torch.device("cuda"))
    generator = random.Random(block_size)
    with Exporter(shape, num_blocks=300, block_size=block_size) as exporter:
        opener = opener_of(store)
        assert opener.obstacle(exporter.hello) == ""
        pool = opener.open(exporter.hello, LINK)
        for tokens in (range(1), range(3, 700), range(512, 2048)):
            theirs = generator.sample(range(300), -(-tokens.stop // block_size))
            blocks = generator.sample(range(80), -(-tokens.stop // 64))
            for layers in (range(1), range(1, shape.num_layers), range(shape.num_layers)):
                assert pool.copy(layers, theirs[tokens.start // block_size :], tokens, blocks) is None
                landed(store)
                assert read(store, layers, blocks, tokens) == exporter.ask("read", layers, theirs, tokens)
        pool.close()


def test_a_probe_passes_and_a_changed_one_shows(exporter: Exporter) -> None:
    store = TorchKvStore(GEOMETRY, 4, 256, torch.device("cuda"))
    pool = opener_of(store).open(exporter.hello, LINK)
    pattern = random.Random(0).randbytes(exporter.hello.layout.probe_bytes)
    exporter.ask("probe", pattern)
    found, seconds = pool.probe(len(pattern))
    assert found == crc32c(pattern)
    assert seconds > 0
    exporter.ask("probe", pattern[::-1])
    assert pool.probe(len(pattern))[0] == crc32c(pattern[::-1])
    pool.close()


def test_a_mapping_that_was_closed_can_be_opened_again_and_holds_no_memory(exporter: Exporter) -> None:
    store = TorchKvStore(GEOMETRY, 8, 256, torch.device("cuda"))
    opener = opener_of(store)
    for _ in range(50):
        pool = opener.open(exporter.hello, LINK)
        pool.copy(LAYERS, [5], range(256), [0])
        pool.close()
        with pytest.raises(TransferRejectedError):
            pool.copy(LAYERS, [5], range(256), [0])
    assert read(store, LAYERS, [0], range(256)) == exporter.ask("read", LAYERS, [5], range(256))


def test_more_than_the_peer_has_is_not_mapped(exporter: Exporter) -> None:
    store = TorchKvStore(GEOMETRY, 4, 256, torch.device("cuda"))
    lying = pb.LinkHello()
    lying.CopyFrom(exporter.hello)
    lying.layout.num_bytes *= 1000
    with pytest.raises(UnavailableError, match="bytes of an allocation"):
        opener_of(store).open(lying, LINK)
    opener_of(store).open(exporter.hello, LINK).close()


def test_a_peer_that_is_killed_takes_nothing_with_it() -> None:
    store = TorchKvStore(GEOMETRY, 8, 256, torch.device("cuda"))
    with Exporter(GEOMETRY, num_blocks=8, block_size=256) as exporter:
        expected = exporter.ask("read", LAYERS, [3], range(256))
        pool = opener_of(store).open(exporter.hello, LINK)
        for _ in range(200):
            pool.copy(LAYERS, [3], range(256), [0])
        exporter.kill()
        pool.close()
    landed(store)
    assert read(store, LAYERS, [0], range(256)) == expected
    assert torch.ones(1000, device="cuda").sum().item() == 1000, "the device has failed"


def test_a_process_cannot_link_with_itself_and_says_so() -> None:
    store = TorchKvStore(GEOMETRY, 4, 256, torch.device("cuda"), shared=True)
    shared, opener = cuda_shared_pool(store), opener_of(store)
    assert shared is not None
    hello = pb.LinkHello(incarnation="importer")
    shared.describe(hello)
    assert opener.obstacle(hello) == Obstacle.SAME_PROCESS
    hello.incarnation = "another"
    with pytest.raises(UnavailableError, match="cudaIpcOpenMemHandle"):
        opener.open(hello, LINK)
    assert hello.gpu_uuid == gpu_uuid(torch.device("cuda"))
    assert torch.ones(1000, device="cuda").sum().item() == 1000, "the error was taken for a kernel's"


def test_frames_come_back_as_they_were_written_however_many_are_on_the_way() -> None:
    store = TorchKvStore(GEOMETRY, 80, 64, torch.device("cuda"))
    blocks, generator = random.Random(0).sample(range(80), 64), random.Random(1)
    frames = [(range(n, n + 1), range(start, start + 512)) for start in range(0, 4096, 512) for n in LAYERS]
    payloads = [generator.randbytes(GEOMETRY.span_bytes(0, 1, 512)) for _ in frames]
    for (layers, tokens), payload in zip(frames, payloads, strict=True):
        landing = store.landing(layers, blocks, tokens)
        (part,) = landing.parts
        part[:] = payload
        landing.finish()
    landed(store)
    ahead = store.read_ahead(*frames[0][:1], blocks, frames[0][1])
    for number, payload in enumerate(payloads):
        reading = ahead
        if number + 1 < len(frames):
            layers, tokens = frames[number + 1]
            ahead = store.read_ahead(layers, blocks, tokens)
        assert reading.pending is not None
        reading.pending.wait()
        assert b"".join(reading.parts) == payload
        reading.release()


def busy() -> None:
    """Tens of milliseconds of work on the default stream."""
    matrix = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        matrix = matrix @ matrix


def test_written_is_not_done_before_the_kernels_are() -> None:
    store = TorchKvStore(GEOMETRY, 4, 256, torch.device("cuda"))
    store.mark_written(0)
    torch.cuda.synchronize()
    busy()
    store.mark_written(1)
    before, after = store.written(range(1)), store.written(range(2))
    assert before is not None
    assert after is not None
    assert before.done()
    assert not after.done()
    after.wait()
    assert after.done()


def test_what_lands_comes_after_the_last_kernels_of_the_blocks_former_request() -> None:
    store = TorchKvStore(GEOMETRY, 4, 256, torch.device("cuda"))
    payload = random.Random(0).randbytes(GEOMETRY.span_bytes(0, 4, 256))
    landing = store.landing(LAYERS, [1], range(256))
    landing.parts[0][:] = payload
    torch.cuda.synchronize()
    busy()
    store.memory.tensor.zero_()
    store.landings_follow_engine()
    landing.finish()
    landed(store)
    assert read(store, LAYERS, [1], range(256)) == payload


def test_what_the_engine_writes_next_comes_after_what_has_landed() -> None:
    store = TorchKvStore(GEOMETRY, 4, 256, torch.device("cuda"))
    landing = store.landing(LAYERS, [1], range(256))
    landing.parts[0][:] = bytes([1]) * len(landing.parts[0])
    torch.cuda.synchronize()
    busy()
    store.landings_follow_engine()
    landing.finish()
    store.engine_follows_landings()
    store.memory.tensor.fill_(2)
    torch.cuda.synchronize()
    assert set(read(store, LAYERS, [1], range(256))) == {2}
