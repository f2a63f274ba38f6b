"""Runs of slots say the same as the formula for single tokens, and no two of them could be one."""

from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine.runs import slot_runs


@given(block_size=st.integers(1, 5), blocks=st.permutations(range(6)), data=st.data())
def test_runs_are_the_slots_of_the_tokens_in_order(block_size: int, blocks: list[int], data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(blocks) * block_size)] * 2)))
    runs = slot_runs(blocks, range(start, stop), block_size)
    slots = [slot for run in runs for slot in run]
    assert slots == [blocks[token // block_size] * block_size + token % block_size for token in range(start, stop)]
    assert all(left.stop != right.start for left, right in zip(runs, runs[1:], strict=False))


def test_blocks_that_follow_one_another_are_one_run() -> None:
    assert slot_runs([3, 4, 5, 9], range(2, 15), 4) == [range(14, 24), range(36, 39)]
