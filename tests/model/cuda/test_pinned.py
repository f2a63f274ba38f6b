"""Pinned buffers are used again, by nobody before the device is done with them, and there are never many of them."""

import gc

import torch

from kvbaton.model.cuda.pinned import PinnedRing
from support.cudart import FakeEvent


class Maker:
    """Makes buffers and notes their sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, size: int) -> torch.Tensor:
        self.sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)


def test_a_buffer_that_was_released_is_used_again() -> None:
    made = Maker()
    ring = PinnedRing(made, num_buffers=2, size=100)
    for size in (100, 1, 60):
        lease = ring.take(size)
        assert len(lease.bytes) == size
        lease.release()
        lease.release()
    assert made.sizes == [100]


def test_two_leases_never_share_a_buffer() -> None:
    ring = PinnedRing(Maker(), num_buffers=2, size=100)
    leases = [ring.take(100) for _ in range(4)]
    assert len({lease.bytes.data_ptr() for lease in leases}) == 4
    for lease in leases:
        lease.release()
    again = [ring.take(100) for _ in range(4)]
    assert len({lease.bytes.data_ptr() for lease in again}) == 4


def test_no_more_buffers_are_kept_than_the_ring_has() -> None:
    made = Maker()
    ring = PinnedRing(made, num_buffers=2, size=100)
    for _ in range(3):
        leases = [ring.take(100) for _ in range(5)]
        for lease in leases:
            lease.release()
    assert len(made.sizes) == 5 + 3 + 3


def test_a_buffer_is_not_given_out_while_the_device_uses_it() -> None:
    made = Maker()
    ring = PinnedRing(made, num_buffers=2, size=100)
    lease, event = ring.take(10), FakeEvent([], "copy")
    event.passed = False
    lease.used_until(event)
    lease.release()
    ring.take(10)
    assert made.sizes == [100, 100]
    event.passed = True
    ring.take(10)
    assert made.sizes == [100, 100]


def test_a_frame_that_is_larger_has_a_buffer_of_its_own() -> None:
    made = Maker()
    ring = PinnedRing(made, num_buffers=2, size=100)
    ring.take(101).release()
    ring.take(101).release()
    assert made.sizes == [101, 101]


def test_a_lease_that_is_lost_gives_its_buffer_back() -> None:
    made = Maker()
    ring = PinnedRing(made, num_buffers=2, size=100)
    lease = ring.take(10)
    del lease
    gc.collect()
    ring.take(10)
    assert made.sizes == [100]
