"""The prefix cache: requests that begin alike share the blocks of what they have in common.

Which blocks those are the pool knows, by the digests of `engine.hashing` (the scheme is that of Kwon et al. 2023,
"PagedAttention", with the hashed blocks and the LRU order that vLLM has made common).
"""

from collections.abc import Iterator

from kvbaton.engine.pool import BlockPool
from kvbaton.engine.request import Request


def match(pool: BlockPool, request: Request) -> list[int]:
    """Blocks that hold KV for the request's beginning; neither they nor the pool are changed.

    Never that of its last token, whose logits are needed. What is not found is not hashed, beyond one block.
    """
    if not request.uses_prefix_cache:
        return []
    return pool.match(_digests(pool, request, 0, (request.num_prefill - 1) // pool.block_size))


def register(pool: BlockPool, request: Request) -> None:
    """Let others find the request's blocks, as far as they are full of computed KV."""
    start, stop = request.num_registered, request.num_computed // pool.block_size
    if start < stop:
        for block, digest in zip(request.blocks[start:stop], _digests(pool, request, start, stop), strict=True):
            pool.register(block, digest)
        request.num_registered = stop


def _digests(pool: BlockPool, request: Request, start: int, stop: int) -> Iterator[bytes]:
    size, hashes = pool.block_size, request.hashes
    for index in range(start, stop):
        if index == len(hashes.digests):
            hashes.push(request.token_ids(index * size, (index + 1) * size))
        yield hashes.digests[index]
