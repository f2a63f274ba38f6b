"""Every block has exactly the holders that say so, and is found by its prefix until it is used for something else."""

import copy

import pytest

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
    with pytest.raises(AssertionError, match="is empty"):
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
    pool._empty.extend(blocks)
    with pytest.raises(AssertionError, match="free blocks differ"):
        pool.check_integrity([blocks])


def test_integrity_finds_a_lost_block() -> None:
    pool = BlockPool(3, 4)
    pool._empty.pop()
    with pytest.raises(AssertionError, match="free blocks differ"):
        pool.check_integrity([])


def test_a_registered_block_is_found_until_it_is_needed_for_something_else() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(2)
    pool.register(blocks[0], b"a")
    assert pool.match([b"a", b"b"]) == [blocks[0]]
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached) == (2, 1)
    assert pool.match([b"a"]) == [blocks[0]]
    assert pool.allocate(1) == [blocks[1]], "an empty block is taken first"
    assert pool.match([b"a"]) == [blocks[0]]
    assert pool.allocate(1) == [blocks[0]]
    assert pool.match([b"a"]) == []
    assert pool.num_cached == 0
    pool.check_integrity([blocks])


def test_a_match_ends_at_the_first_miss_and_asks_for_nothing_beyond() -> None:
    pool = BlockPool(3, 4)
    blocks = pool.allocate(2)
    pool.register(blocks[0], b"a")
    pool.register(blocks[1], b"c")
    digests = iter([b"a", b"b", b"c"])
    assert pool.match(digests) == [blocks[0]]
    assert next(digests) == b"c"


def test_a_cached_block_that_is_retained_is_held_again() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.register(blocks[0], b"a")
    pool.release(blocks)
    pool.retain(blocks)
    assert (pool.num_free, pool.num_cached) == (1, 0)
    pool.check_integrity([blocks])


def test_what_is_about_to_be_reused_is_not_there_to_allocate() -> None:
    pool = BlockPool(3, 4)
    blocks, held = pool.allocate(2), pool.allocate(1)
    for block, digest in zip(blocks + held, (b"a", b"b", b"c"), strict=True):
        pool.register(block, digest)
    pool.release(blocks)
    assert [pool.can_allocate(n, reusing=blocks[:1] + held) for n in range(4)] == [True, True, False, False]
    pool.retain(blocks[:1])
    assert pool.can_allocate(1)
    assert not pool.can_allocate(2)


def test_the_least_recently_released_is_evicted_first_and_of_a_list_its_end() -> None:
    pool = BlockPool(4, 4)
    early, late = pool.allocate(2), pool.allocate(2)
    for block, digest in zip(early + late, (b"a", b"b", b"c", b"d"), strict=True):
        pool.register(block, digest)
    pool.release(early)
    pool.release(late)
    assert pool.allocate(4) == [*reversed(early), *reversed(late)]


def test_the_same_kv_is_registered_once() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.register(first[0], b"a")
    pool.register(second[0], b"a")
    assert pool.match([b"a"]) == first
    pool.release(second)
    assert pool.num_cached == 0
    pool.check_integrity([first])


def test_forgotten_blocks_are_found_no_more_and_stay_with_their_holders() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(2)
    pool.register(blocks[0], b"a")
    pool.forget(blocks)
    assert pool.match([b"a"]) == []
    pool.check_integrity([blocks])
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached) == (2, 0)


def test_only_held_blocks_are_registered_or_forgotten() -> None:
    pool = BlockPool(1, 4)
    with pytest.raises(AssertionError, match="is not held"):
        pool.register(0, b"a")
    with pytest.raises(AssertionError, match="is not held"):
        pool.forget([0])


def test_integrity_finds_a_cache_that_differs_from_its_blocks() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.register(blocks[0], b"a")
    pool._digests[blocks[0]] = None
    with pytest.raises(AssertionError, match="prefix cache differs"):
        pool.check_integrity([blocks])


def test_repr_says_how_full_it_is() -> None:
    pool = BlockPool(3, 4)
    pool.allocate(1)
    assert repr(pool) == "<BlockPool 2 of 3 blocks free, 4 tokens each>"
