"""KV between a device's pool, frames and other pools: the bytes, and the order of copies and the engine's kernels."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from kvbaton.engine.geometry import KvGeometry, LayerGeometry
from kvbaton.engine.pool_layout import lay_out, row_bytes
from kvbaton.handoff.landing import fill
from kvbaton.model.cuda import copies as module
from kvbaton.model.cuda.copies import DevicePool, KvCopies
from support.cudart import FakeStream

GEOMETRY = KvGeometry((LayerGeometry(2, 4, 4), LayerGeometry(2, 4, 4), LayerGeometry(1, 6, 2)), "bfloat16")
LAYERS = range(3)


class Device:
    """A pool, host memory standing in for a device's, and copies of it."""

    def __init__(self, num_blocks: int = 9, block_size: int = 4, seed: int = 0) -> None:
        layout = lay_out(GEOMETRY, num_blocks, block_size, probe_bytes=1024)
        memory = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, layout.num_bytes, dtype=np.uint8))
        self.log: list[str] = []
        self.reads, self.landings = FakeStream("reads", self.log), FakeStream("landings", self.log)
        self.pool = DevicePool(memory, layout, GEOMETRY)
        self.copies = KvCopies(self.pool, self.reads, self.landings)

    def content(self, layers: range, blocks: Sequence[int], tokens: range) -> bytes:
        """A payload, token by token."""
        layout, memory = self.pool.layout, self.pool.memory.numpy()
        result = b""
        for layer in layers:
            sides = layout.k_offsets[layer], layout.v_offsets[layer]
            for offset, width in zip(sides, row_bytes(GEOMETRY)[layer], strict=True):
                for token in tokens:
                    slot = blocks[token // layout.block_size] * layout.block_size + token % layout.block_size
                    result += memory[offset + slot * width :][:width].tobytes()
        return result


def test_what_is_read_is_a_payload() -> None:
    device = Device()
    blocks, tokens = [7, 8, 2, 0], range(3, 15)
    expected = device.content(range(1, 3), blocks, tokens)
    assert bytes(device.copies.read(range(1, 3), blocks, tokens)) == expected
    reading = device.copies.read_ahead(range(1, 3), blocks, tokens)
    assert b"".join(reading.parts) == expected
    assert reading.pending is not None
    assert reading.pending.done()


def test_what_has_landed_is_in_its_blocks_and_nowhere_else() -> None:
    device, blocks, tokens = Device(), [5, 1, 2], range(2, 11)
    before = device.pool.memory.clone()
    payload = random.Random(1).randbytes(GEOMETRY.span_bytes(0, 3, len(tokens)))
    fill(device.copies.landing(LAYERS, blocks, tokens), payload)
    assert device.content(LAYERS, blocks, tokens) == payload
    # What lay there before, put back, leaves no trace.
    untouched = Device()
    fill(device.copies.landing(LAYERS, blocks, tokens), untouched.content(LAYERS, blocks, tokens))
    assert device.pool.memory.equal(before)


def test_pools_with_other_blocks_are_copied_from() -> None:
    ours, theirs = Device(block_size=4), Device(num_blocks=5, block_size=7, seed=1)
    tokens = range(5, 20)
    their_blocks, blocks = [3, 0, 4], [8, 2, 1, 6, 0]
    slots = theirs.pool.runs(their_blocks, tokens)
    ours.copies.copy(theirs.pool, range(1, 3), slots, (blocks, tokens))
    assert ours.content(range(1, 3), blocks, tokens) == theirs.content(range(1, 3), their_blocks, tokens)
    assert ours.content(range(1), blocks, tokens) == Device(block_size=4).content(range(1), blocks, tokens)
    assert ours.log == ["landings works"]


def test_a_read_comes_after_the_kernels_that_wrote_its_layers() -> None:
    device = Device()
    for layer in (0, 1, 1):
        device.copies.mark_written(layer)
    device.copies.read_ahead(range(1, 3), [0], range(2))
    assert device.log == ["reads follows engine 2", "reads works"]


def test_written_is_done_when_the_layers_kernels_are() -> None:
    device = Device()
    device.reads.events_pass = False
    device.copies.mark_written(0)
    device.copies.mark_written(1)
    pending = device.copies.written(range(2))
    assert not pending.done()
    # A later chunk of the same layer is nobody's business who asked before.
    device.copies.mark_written(1)
    device.reads.events[0].passed = device.reads.events[1].passed = True
    assert pending.done()
    assert not device.copies.written(range(2)).done()
    device.copies.written(range(2)).wait()
    assert device.log == ["wait for engine 0", "wait for engine 2"]
    assert device.copies.written(range(2, 3)).done()


def test_a_landing_waits_for_nothing_and_landed_for_all_of_them() -> None:
    device = Device()
    device.landings.events_pass = False
    device.copies.landings_follow_engine()
    landings = [device.copies.landing(LAYERS, [n], range(4)) for n in range(2)]
    for landing in landings:
        landing.finish()
    assert device.log == ["landings follows the engine", "landings works", "landings works"]
    pending = device.copies.landed()
    assert not pending.done()
    device.copies.engine_follows_landings()
    pending.wait()
    assert device.log[3:] == ["the engine follows landings", "wait for landings 2"]
    assert pending.done()


def test_a_buffer_receives_again_once_its_copy_is_done() -> None:
    device = Device()
    device.landings.events_pass = False
    device.copies.landing(LAYERS, [0], range(4)).finish()
    device.copies.landing(LAYERS, [1], range(4)).finish()
    assert len(device.landings.pinned_sizes) == 2
    for event in device.landings.events:
        event.passed = True
    device.copies.landing(LAYERS, [2], range(4)).finish()
    assert len(device.landings.pinned_sizes) == 2


def test_a_buffer_is_read_into_again_once_it_was_sent() -> None:
    device = Device()
    first = device.copies.read_ahead(LAYERS, [0], range(4))
    second = device.copies.read_ahead(LAYERS, [1], range(4))
    for _ in range(3):
        first.release()
        first, second = second, device.copies.read_ahead(LAYERS, [2], range(4))
    assert len(device.reads.pinned_sizes) == 2


def test_a_device_that_falls_behind_is_waited_for_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_QUEUED", 3)
    device = Device()
    device.landings.events_pass = False
    for n in range(5):
        device.copies.landing(LAYERS, [n], range(4)).finish()
    assert [line for line in device.log if line.startswith("wait")] == ["wait for landings 0", "wait for landings 1"]


def test_probes_go_through_the_device() -> None:
    ours, theirs = Device(), Device(seed=1)
    pattern = random.Random(2).randbytes(1000)
    theirs.copies.write_probe(pattern)
    found, seconds = ours.copies.probe(theirs.pool.memory[:1000])
    assert found == pattern
    assert 0 < seconds < 10
