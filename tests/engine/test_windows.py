"""Where layers with a sliding window begin: no later than what is seen, in whole blocks, and early enough for the next
request with the same prompt.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine.windows import usable_blocks, window_start

sizes = st.integers(1, 9)


@pytest.mark.parametrize(
    ("window", "tokens", "block_size", "start"),
    [
        (None, range(100), 16, 0),
        (200, range(100), 16, 0),
        (100, range(100), 16, 0),
        # Blocks 0 to 5 are full before the last token: whoever comes next goes on at 96 and sees 77 to 96.
        (20, range(100), 16, 64),
        (20, range(80, 100), 16, 80),
        (1, range(97), 16, 96),
        (1, range(96), 16, 80),
        (4, range(100), 1, 96),
    ],
)
def test_examples(window: int | None, tokens: range, block_size: int, start: int) -> None:
    assert window_start(window, tokens, block_size) == start


@given(window=sizes, num_tokens=st.integers(1, 60), block_size=sizes, data=st.data())
def test_what_comes_before_is_seen_by_nobody(
    window: int, num_tokens: int, block_size: int, data: st.DataObject
) -> None:
    cached = data.draw(st.integers(0, (num_tokens - 1) // block_size)) * block_size
    start = window_start(window, range(cached, num_tokens), block_size)
    assert cached <= start < num_tokens
    assert start % block_size == 0
    # The first token that is computed here, and the first of whoever finds the prompt in the cache.
    for position in (num_tokens, (num_tokens - 1) // block_size * block_size):
        first_seen = max(0, position - window + 1)
        assert max(cached, first_seen - first_seen % block_size) >= start
    assert num_tokens - start <= window - 1 + 2 * block_size


@given(cut=st.lists(st.booleans(), max_size=20), window=st.integers(1, 30), block_size=sizes)
def test_one_goes_on_after_as_many_blocks_as_one_can(cut: list[bool], window: int, block_size: int) -> None:
    def can_go_on(num_blocks: int) -> bool:
        position = num_blocks * block_size
        seen = range(max(0, position - window + 1), position)
        # From the first seen token's block on: kernels read whole blocks.
        first = seen.start // block_size
        return not any(cut[first:num_blocks])

    assert usable_blocks(cut, window, block_size) == max(n for n in range(len(cut) + 1) if can_go_on(n))
