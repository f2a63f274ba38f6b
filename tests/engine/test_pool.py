"""Every block has exactly the holders that say so, whatever is allocated, shared and released in whatever order."""

import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvbaton.engine.pool import BlockPool


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 8), (8, 0), (-1, 8), (8, -1)])
def test_a_pool_without_room_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"not {num_blocks} of {block_size}"):
        BlockPool(num_blocks, block_size)


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_blocks_for(num_tokens: int, blocks: int) -> None:
    assert BlockPool(4, 8).blocks_for(num_tokens) == blocks


def test_allocated_blocks_are_distinct_and_come_back() -> None:
    pool = BlockPool(5, 4)
    first, second = pool.allocate(2), pool.allocate(3)
    assert sorted(first + second) == list(range(5))
    assert pool.num_free == 0
    pool.release(first)
    assert pool.num_free == 2
    assert sorted(pool.allocate(2)) == sorted(first)


def test_nothing_is_allocated_for_nothing() -> None:
    pool = BlockPool(1, 4)
    assert pool.allocate(0) == []
    assert pool.num_free == 1


def test_can_allocate_tells_the_truth_and_changes_nothing() -> None:
    pool = BlockPool(3, 4)
    held = pool.allocate(1)
    before = copy.deepcopy(vars(pool))
    assert [pool.can_allocate(n) for n in range(5)] == [True, True, True, False, False]
    assert vars(pool) == before
    pool.check_integrity([held])


def test_allocating_more_than_is_free_changes_nothing() -> None:
    pool = BlockPool(2, 4)
    with pytest.raises(AssertionError, match="without can_allocate"):
        pool.allocate(3)
    assert pool.num_free == 2
    pool.check_integrity([])


def test_a_retained_block_is_freed_by_its_last_holder() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.retain(blocks)
    pool.release(blocks)
    assert pool.num_free == 1
    pool.check_integrity([blocks])
    pool.release(blocks)
    assert pool.num_free == 2
    pool.check_integrity([])


def test_a_free_block_can_be_neither_retained_nor_released() -> None:
    pool = BlockPool(1, 4)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="is free"):
        pool.retain(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


def test_integrity_finds_a_leak() -> None:
    pool = BlockPool(3, 4)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="references differ"):
        pool.check_integrity([])


def test_integrity_finds_a_block_with_two_holders_and_one_reference() -> None:
    pool = BlockPool(3, 4)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="references differ"):
        pool.check_integrity([blocks, blocks])


def test_integrity_finds_a_held_block_in_the_free_list() -> None:
    pool = BlockPool(3, 4)
    blocks = pool.allocate(1)
    pool._free.extend(blocks)
    with pytest.raises(AssertionError, match="free list differs"):
        pool.check_integrity([blocks])


def test_integrity_finds_a_lost_block() -> None:
    pool = BlockPool(3, 4)
    pool._free.pop()
    with pytest.raises(AssertionError, match="free list differs"):
        pool.check_integrity([])


def test_repr_says_how_full_it_is() -> None:
    pool = BlockPool(3, 4)
    pool.allocate(1)
    assert repr(pool) == "<BlockPool 2 of 3 blocks free, 4 tokens each>"


class PoolMachine(RuleBasedStateMachine):
    """Holders come, share and go; the model is a list of what each holds."""

    holders = Bundle("holders")

    @initialize(num_blocks=st.integers(1, 12))
    def make(self, num_blocks: int) -> None:
        """A pool and nobody in it."""
        self.pool = BlockPool(num_blocks, 4)
        self.held: dict[int, list[int]] = {}
        self.serial = 0

    def _hold(self, blocks: list[int]) -> int:
        self.serial += 1
        self.held[self.serial] = blocks
        return self.serial

    @rule(target=holders, num_blocks=st.integers(0, 6))
    def allocate(self, num_blocks: int) -> int:
        """Take blocks that nobody had; where they are not there, nothing happens."""
        if not self.pool.can_allocate(num_blocks):
            assert num_blocks > self.pool.num_free
            return self._hold([])
        taken = {block for blocks in self.held.values() for block in blocks}
        blocks = self.pool.allocate(num_blocks)
        assert taken.isdisjoint(blocks)
        assert len(set(blocks)) == num_blocks
        return self._hold(blocks)

    @rule(target=holders, holder=holders, data=st.data())
    def share(self, holder: int, data: st.DataObject) -> int:
        """A second holder of the first few of somebody's blocks."""
        count = data.draw(st.integers(0, len(self.held[holder])))
        blocks = self.held[holder][:count]
        self.pool.retain(blocks)
        return self._hold(blocks)

    @rule(holder=consumes(holders))
    def release(self, holder: int) -> None:
        """Somebody goes."""
        self.pool.release(self.held.pop(holder))

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        """The pool agrees with the model."""
        self.pool.check_integrity(list(self.held.values()))
        taken = {block for blocks in self.held.values() for block in blocks}
        assert self.pool.num_free == self.pool.num_blocks - len(taken)

    def teardown(self) -> None:
        """When all have gone, all is free."""
        if not hasattr(self, "pool"):
            return
        for blocks in self.held.values():
            self.pool.release(blocks)
        assert self.pool.num_free == self.pool.num_blocks


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPoolMachine = PoolMachine.TestCase
