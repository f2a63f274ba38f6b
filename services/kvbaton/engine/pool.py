"""The block pool: who holds which fixed-size piece of KV memory. Bookkeeping only; the bytes are the model's."""

from collections.abc import Sequence


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, with reference counts.

    A query never changes anything and a command that its query allowed never fails: `can_allocate(n)` then
    `allocate(n)`.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Raises ValueError when either is not positive."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and tokens in them, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is the one most likely to be in a cache still.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    def __repr__(self) -> str:
        return f"<BlockPool {self.num_free} of {self.num_blocks} blocks free, {self.block_size} tokens each>"

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether `allocate(num_blocks)` would succeed now."""
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks, each with one reference. Ask `can_allocate` first."""
        assert self.can_allocate(num_blocks), "allocate without can_allocate"
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def retain(self, blocks: Sequence[int]) -> None:
        """Add a holder to blocks that are already held."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free"
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one holder of each block; a block without holders is free again."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def check_integrity(self, held: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless `held`, the block lists of all holders, accounts for every reference."""
        counted = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                counted[block] += 1
        assert counted == self._references, "references differ from what holders hold"
        assert sorted(self._free) == [b for b, n in enumerate(counted) if n == 0], "free list differs from references"
