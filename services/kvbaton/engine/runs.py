"""Where a request's tokens lie in a pool: few long runs of slots, where its blocks follow one another."""

from collections.abc import Sequence


def slot_runs(blocks: Sequence[int], tokens: range, block_size: int) -> list[range]:
    """The slots of `tokens`, in order, as the fewest runs of consecutive ones.

    Token t lies in slot `blocks[t // block_size] * block_size + t % block_size`.
    """
    runs: list[range] = []
    token = tokens.start
    while token < tokens.stop:
        offset = token % block_size
        length = min(block_size - offset, tokens.stop - token)
        start = blocks[token // block_size] * block_size + offset
        if runs and runs[-1].stop == start:
            runs[-1] = range(runs[-1].start, start + length)
        else:
            runs.append(range(start, start + length))
        token += length
    return runs
