"""Another process's pool: read where it lies, refused before it is mapped, never read beyond its end, unmapped once."""

from collections.abc import Sequence

import pytest
import torch

from kvbaton.engine.errors import TransferRejectedError
from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.engine.pool_layout import lay_out
from kvbaton.model.cuda.copies import DevicePool, KvCopies
from kvbaton.model.cuda.device_memory import Mapping, allocate
from kvbaton.model.cuda.foreign import ForeignKv, readable_device
from support.cudart import FakeStream, Gpus, Process

GEOMETRY = KvGeometry((LayerGeometry(2, 4, 4), LayerGeometry(1, 6, 2)), "bfloat16")
LAYERS = range(2)
DEVICE = torch.device("cpu", 0)


class Pair:
    """A sender's pool in one process and a receiver's in another, on one GPU."""

    def __init__(self) -> None:
        self.gpus = Gpus()
        self.sender, self.receiver = Process(self.gpus), Process(self.gpus)
        self.log: list[str] = []
        self.theirs, self.their_copies = self._pool(self.sender, num_blocks=6, block_size=8)
        self.ours, self.copies = self._pool(self.receiver, num_blocks=9, block_size=4)
        self.theirs.memory.copy_(torch.arange(len(self.theirs.memory)).mul(31).to(torch.uint8))
        handle = self.sender.runtime().export(0, self.theirs.memory.data_ptr())
        mapping = Mapping(self.receiver.runtime(), DEVICE, handle, self.theirs.layout.num_bytes)
        self.foreign = ForeignKv(mapping, self.theirs.layout, GEOMETRY, self.copies)

    def _pool(self, process: Process, num_blocks: int, block_size: int) -> tuple[DevicePool, KvCopies]:
        layout = lay_out(GEOMETRY, num_blocks, block_size, probe_bytes=256)
        pool = DevicePool(allocate(process.runtime(), DEVICE, layout.num_bytes), layout, GEOMETRY)
        return pool, KvCopies(pool, FakeStream("reads", self.log), FakeStream("landings", self.log))


def test_rows_come_from_where_they_lie() -> None:
    pair = Pair()
    # The sender names the blocks from the one that holds token 11 on: its second.
    whole, tokens, blocks = [0, 5, 2], range(11, 20), [0, 0, 7, 3, 1]
    pair.foreign.copy(LAYERS, whole[1:], tokens, blocks)
    pair.copies.landed().wait()
    assert pair.copies.read(LAYERS, blocks, tokens) == pair.their_copies.read(LAYERS, whole, tokens)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        ([5], "1 where 2 must be"),
        ([5, 2, 0], "3 where 2 must be"),
        ([5, 6], "6 of a pool of 6"),
        ([5, -1], "of a pool of 6"),
        ([5, 1 << 40], "of a pool of 6"),
    ],
)
def test_blocks_that_the_sender_does_not_have_are_refused(theirs: Sequence[int], reason: str) -> None:
    pair = Pair()
    before = pair.ours.memory.clone()
    with pytest.raises(TransferRejectedError, match=reason):
        pair.foreign.copy(LAYERS, theirs, range(11, 20), [0, 1, 2, 3, 4])
    assert pair.ours.memory.equal(before)


def test_a_probe_is_what_the_sender_wrote() -> None:
    pair = Pair()
    pattern = bytes(range(200))
    pair.their_copies.write_probe(pattern)
    found, seconds = pair.foreign.probe(200)
    assert found == pattern
    assert seconds > 0
    assert len(pair.foreign.probe(1 << 30)[0]) == 256, "no more is read than the probe area has"


def test_the_mapping_is_closed_once_and_after_the_copies() -> None:
    pair = Pair()
    pair.foreign.copy(LAYERS, [5], range(8), [0, 1])
    del pair.log[:]
    pair.foreign.close()
    pair.foreign.close()
    assert pair.log == ["wait for landings 0"]
    assert pair.receiver.opened == []
    assert pair.receiver.names.count("cudaIpcCloseMemHandle") == 1
    for use in (lambda: pair.foreign.copy(LAYERS, [5], range(8), [0, 1]), lambda: pair.foreign.probe(1)):
        with pytest.raises(TransferRejectedError, match="link to the sender's memory has ended"):
            use()


def test_the_gpu_is_ours_or_one_that_ours_can_read() -> None:
    gpus = Gpus(3)
    gpus.peers.add((0, 1))
    process = Process(gpus)
    runtime = process.runtime()
    uuids = ["a", "b", "c"]
    assert readable_device(runtime, 0, uuids, "a") == 0
    assert readable_device(runtime, 0, uuids, "b") == 1
    assert readable_device(runtime, 0, uuids, "c") is None
    assert readable_device(runtime, 1, uuids, "a") is None
    assert readable_device(runtime, 0, uuids, "elsewhere") is None
    assert "cudaIpcOpenMemHandle" not in process.names
