"""The benchmark of GPU pools moves what it says, to the byte, and says so where there is no GPU."""

import random

import handoff_cuda
import pytest
import torch
from handoff_cuda import Device, Load

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.model.cuda.copies import DevicePool, KvCopies
from kvbaton.model.store import TorchKvStore
from support.cudart import FakeStream

GEOMETRY = KvGeometry((LayerGeometry(1, 4, 4),) * 3, "bfloat16")
BLOCK = 256
CPU = torch.device("cpu")


class Foreign:
    """The other process's pool: another one of this process, with the same contents."""

    def __init__(self, store: TorchKvStore, target: TorchKvStore) -> None:
        self._pool = DevicePool(store.memory.tensor, store.layout, GEOMETRY)
        own = DevicePool(target.memory.tensor, target.layout, GEOMETRY)
        self._copies = KvCopies(own, FakeStream("reads", []), FakeStream("landings", []))

    def probe(self, num_bytes: int) -> tuple[int, float]:
        raise NotImplementedError

    def copy(self, layers: range, theirs: list[int], tokens: range, blocks: list[int]) -> int | None:
        offset = tokens.start % BLOCK
        slots = self._pool.runs(theirs, range(offset, offset + len(tokens)))
        self._copies.copy(self._pool, layers, slots, (blocks, tokens))
        return None

    def close(self) -> None:
        raise NotImplementedError


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(handoff_cuda, "GEOMETRY", GEOMETRY)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    source, target = (TorchKvStore(GEOMETRY, 6, BLOCK, CPU) for _ in range(2))
    content = random.Random(0).randbytes(len(source.memory.tensor))
    source.memory.tensor.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    target.memory.tensor.zero_()
    return Device(source, target, Foreign(source, target))  # type: ignore[arg-type]


@pytest.fixture(params=[False, True], ids=["in order", "shuffled"])
def load(request: pytest.FixtureRequest) -> Load:
    blocks = [0, 1, 2], [0, 1, 2]
    return Load("a case", range(700), *(([5, 0, 3], [2, 4, 1]) if request.param else blocks))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        handoff_cuda.main(["--mib", "1"])
    assert caught.value.code == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_what_is_compared_has_moved_the_same_kv(device: Device, load: Load) -> None:
    for move in (device.by_ipc, device.by_runs):
        assert not device.same(load)
        move(load)
        assert device.same(load), move


def test_staging_goes_through_every_frame(device: Device, load: Load) -> None:
    device.to_host(load)
    device.from_host(load)
    device.in_one_piece(load)


def test_the_frames_are_all_of_the_kv(device: Device, load: Load) -> None:
    moved = {(layer, token) for frame in load.frames() for layer in frame.layers for token in frame.tokens}
    assert moved == {(layer, token) for layer in range(3) for token in range(700)}
    assert load.num_bytes == 700 * GEOMETRY.token_bytes


def test_shuffled_blocks_are_others_on_each_side() -> None:
    cases = list(handoff_cuda.loads([1, 100], num_blocks=50))
    assert [case.case for case in cases] == [
        "1 MiB, in order",
        "1 MiB, shuffled",
        "100 MiB, in order",
        "100 MiB, shuffled",
    ]
    last = cases[-1]
    assert last.source != last.target
    assert len(set(last.source)) == len(last.source) == -(-len(last.tokens) // BLOCK)
