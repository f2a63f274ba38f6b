"""The block pool: who holds which fixed-size piece of KV memory, and whose KV a piece still is when nobody holds it.

Bookkeeping only; the bytes are the model's. A block is in one of three states:

- held: one or more holders, counted;
- cached: no holder, but the KV of a known prefix; the one released first is the first to be used for something else;
- empty: no holder, and nothing worth keeping.

A cached block is as free as an empty one: `num_free` counts both.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, with reference counts and a prefix cache.

    A query never changes anything and a command that its query allowed never fails: `can_allocate(n)` then
    `allocate(n)`.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Raises ValueError when either is not positive."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and tokens in them, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is the one most likely to be in a cache of the processor still.
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._cut: set[int] = set()
        # Least recently released first. A plain dict would search its way over the holes that eviction leaves.
        self._cached: OrderedDict[int, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<BlockPool {self.num_free} of {self.num_blocks} blocks free, {self.block_size} tokens each>"

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that still are the KV of a known prefix."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks that hold the prefix which `digests` name, from the first block to the first that is not there.

        Digests are taken one by one, and none beyond the first miss.
        """
        blocks: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_allocate(self, num_blocks: int, reusing: Sequence[int] = ()) -> bool:
        """Whether `allocate(num_blocks)` would succeed now, after `retain(reusing)`."""
        return num_blocks <= self.num_free - sum(not self._references[block] for block in reusing)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks, each with one reference; cached ones last. Ask `can_allocate` first."""
        assert self.can_allocate(num_blocks), "allocate without can_allocate"
        blocks: list[int] = []
        for _ in range(num_blocks):
            block = self._empty.pop() if self._empty else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def retain(self, blocks: Sequence[int]) -> None:
        """Add a holder to blocks that are held or cached."""
        for block in blocks:
            if not self._references[block]:
                assert block in self._cached, f"block {block} is empty"
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one holder of each block; a block without holders is free again, and cached if it is registered.

        Of a block list the end is the first to be evicted: a prefix is of use without what follows it, and not the
        other way round.
        """
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._digests[block] is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None

    def register(self, block: int, digest: bytes, *, cut: bool = False) -> None:
        """A held block is full and its KV, that of the prefix `digest`, is in place: `match` may find it from now on.

        That of a `cut` one is in place in layers without a sliding window only. Where the same KV is known already, in
        whichever block, nothing changes, but that a whole block takes the place of a cut one.
        """
        assert self._references[block] > 0, f"block {block} is not held"
        if self._digests[block] is not None:
            return
        known = self._block_of.get(digest)
        if known is not None:
            if cut or known not in self._cut:
                return
            self._unregister(known)
            if known in self._cached:
                del self._cached[known]
                self._empty.append(known)
        self._block_of[digest] = block
        self._digests[block] = digest
        if cut:
            self._cut.add(block)

    def is_cut(self, block: int) -> bool:
        """Whether a block that `match` has found lacks KV in layers with a sliding window."""
        return block in self._cut

    def forget(self, blocks: Sequence[int]) -> None:
        """Nothing finds these held blocks any more; their holders keep them."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is not held"
            self._unregister(block)

    def check_integrity(self, held: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless `held`, the block lists of all holders, accounts for every reference."""
        counted = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                counted[block] += 1
        assert counted == self._references, "references differ from what holders hold"
        free = sorted([*self._empty, *self._cached])
        assert free == [b for b, n in enumerate(counted) if n == 0], "free blocks differ from references"
        assert all(self._digests[block] is None for block in self._empty), "an empty block is registered"
        assert all(self._digests[block] is not None for block in self._cached), "a cached block is not registered"
        registered = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert registered == self._block_of, "the prefix cache differs from the blocks"
        assert self._cut <= set(registered.values()), "a block that is not registered is cut"

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._unregister(block)
        return block

    def _unregister(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._block_of[digest]
            self._digests[block] = None
            self._cut.discard(block)
