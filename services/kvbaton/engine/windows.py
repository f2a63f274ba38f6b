"""Layers with a sliding window: of a prompt that was computed elsewhere they need its end only.

    tokens   0 ........ window start ........ stop - 1 | stop
             [ not sent ][          sent              ]  the first that is computed here, which sees `window` tokens

A token at position p sees positions p - window + 1 to p. The first that the receiver computes itself is at `stop`, and
all later ones see later tokens; so what comes before stop - window + 1 is seen by nobody. Two things make the start
earlier. Kernels read whole blocks, and what is masked must be numbers still: it begins with a block. And whoever asks
for the same prompt again finds its blocks up to the last full one, and goes on from there: it must find what that token
sees.
"""

from collections.abc import Sequence


def window_start(window: int | None, tokens: range, block_size: int) -> int:
    """The first of `tokens` that layers with a sliding window need, of at most `window` tokens; None for no window.

    `tokens` are those that the receiver lacks, up to the last one before it computes; its blocks have `block_size`.
    """
    if window is None:
        return tokens.start
    reusable = (tokens.stop - 1) // block_size * block_size
    return max(tokens.start, first_seen_block(window, reusable, block_size) * block_size)


def first_seen_block(window: int, position: int, block_size: int) -> int:
    """The block of the first token that the one at `position` sees."""
    return max(0, position - window + 1) // block_size


def usable_blocks(cut: Sequence[bool], window: int, block_size: int) -> int:
    """How many of a prompt's leading blocks one can go on after: the token that follows them sees none that is cut."""
    usable = len(cut)
    for index in range(len(cut) - 1, -1, -1):
        if cut[index] and index >= first_seen_block(window, usable * block_size, block_size):
            usable = index
    return usable
