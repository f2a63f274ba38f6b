"""The prefix cache: requests that begin alike share the blocks of what they have in common.

Which blocks those are the pool knows, by the digests of `engine.hashing` (the scheme is that of Kwon et al. 2023,
"PagedAttention", with the hashed blocks and the LRU order that vLLM has made common).
"""

from collections import deque
from collections.abc import Iterable, Iterator

from kvbaton.engine import windows
from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Request, Route

HASHES_A_STEP = 256
"""Blocks of one prompt hashed between two steps while somebody decodes: less than a millisecond, however long it is."""


def match(pool: BlockPool, request: Request, window: int | None, *, hurried: bool) -> list[int] | None:
    """Blocks that hold KV for the request's beginning; neither they nor the pool are changed.

    Never that of its last token, whose logits are needed. What is not found is not hashed, beyond one block. A hurried
    look-up stops after a number of hashes with None, and goes on from there the next time. `window` is the largest of
    the model's layers, None without one.
    """
    if not request.uses_prefix_cache:
        return []
    stop = (request.num_prefill - 1) // pool.block_size
    limit = min(stop, len(request.hashes.digests) + HASHES_A_STEP) if hurried else stop
    blocks = pool.match(_digests(pool, request, 0, limit))
    if len(blocks) == limit < stop:
        return None
    if window is None:
        return blocks
    cut = [pool.is_cut(block) for block in blocks]
    # What is handed on must be there in every layer: the receiver counts on all that it is sent.
    seen = request.num_prefill if request.route is Route.HAND_OFF else window
    return blocks[: windows.usable_blocks(cut, seen, pool.block_size)]


def begin(pool: BlockPool, request: Request, window: int | None, cached: list[int], needed: int) -> None:
    """Give a request the blocks that `match` has found for it, and `needed` others, which the pool must have."""
    pool.retain(cached)
    request.blocks = cached + pool.allocate(needed)
    request.num_registered = len(cached)
    request.num_computed = request.num_cached = len(cached) * pool.block_size
    if request.route is Route.RECEIVE:
        lacking = range(request.num_cached, request.num_prefill)
        request.window_start = windows.window_start(window, lacking, pool.block_size)


def hash_ahead(pool: BlockPool, receiving: Iterable[Request]) -> None:
    """Hash some blocks of a prompt whose KV is on its way: when it arrives, registering it must not hold up a step."""
    for request in receiving:
        start, stop = len(request.hashes.digests), request.num_prefill // pool.block_size
        if start < stop:
            deque(_digests(pool, request, start, min(stop, start + HASHES_A_STEP)), maxlen=0)
            break


def register(pool: BlockPool, request: Request) -> None:
    """Let others find the request's blocks, as far as they are full of computed KV."""
    start, stop = request.num_registered, request.num_computed // pool.block_size
    if start < stop:
        whole_from = request.window_start // pool.block_size
        for index, digest in enumerate(_digests(pool, request, start, stop), start):
            pool.register(request.blocks[index], digest, cut=index < whole_from)
        request.num_registered = stop


def _digests(pool: BlockPool, request: Request, start: int, stop: int) -> Iterator[bytes]:
    size, hashes = pool.block_size, request.hashes
    for index in range(start, stop):
        if index == len(hashes.digests):
            hashes.push(request.token_ids(index * size, (index + 1) * size))
        yield hashes.digests[index]
