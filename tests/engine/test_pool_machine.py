"""Whatever is allocated, shared, cached and released: every block has exactly the holders that say so, and what the
prefix cache finds is what was written.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvbaton.engine.pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Holders come, share and go; the model is a list of what each holds, and what was last written to each block."""

    holders = Bundle("holders")

    @initialize(num_blocks=st.integers(1, 12))
    def make(self, num_blocks: int) -> None:
        """A pool and nobody in it."""
        self.pool = BlockPool(num_blocks, 4)
        self.held: dict[int, list[int]] = {}
        self.content: dict[int, bytes] = {}
        self.cut: dict[int, bool] = {}
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
        for block in blocks:
            self.content.pop(block, None)
        return self._hold(blocks)

    @rule(target=holders, holder=holders, data=st.data())
    def share(self, holder: int, data: st.DataObject) -> int:
        """A second holder of the first few of somebody's blocks."""
        count = data.draw(st.integers(0, len(self.held[holder])))
        blocks = self.held[holder][:count]
        self.pool.retain(blocks)
        return self._hold(blocks)

    @rule(holder=holders, data=st.data(), digest=st.sampled_from([b"a", b"b", b"c", b"d"]), cut=st.booleans())
    def register(self, holder: int, data: st.DataObject, digest: bytes, cut: bool) -> None:
        """Somebody's block is full, once: what is cached is never written again. A whole one is found from now on."""
        empty = [block for block in self.held[holder] if block not in self.content]
        if empty:
            block = data.draw(st.sampled_from(empty))
            self.content[block] = digest
            self.cut[block] = cut
            self.pool.register(block, digest, cut=cut)
            (found,) = self.pool.match([digest])
            assert self.pool.is_cut(found) <= cut

    @rule(target=holders, digest=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def reuse(self, digest: bytes) -> int:
        """What is found under a digest is what was written under it."""
        blocks = self.pool.match([digest])
        assert all(self.content[block] == digest for block in blocks)
        assert all(self.cut[block] == self.pool.is_cut(block) for block in blocks)
        self.pool.retain(blocks)
        return self._hold(blocks)

    @rule(holder=holders)
    def forget(self, holder: int) -> None:
        """Somebody's blocks are not to be trusted."""
        self.pool.forget(self.held[holder])
        assert all(set(self.pool.match([digest])).isdisjoint(self.held[holder]) for digest in (b"a", b"b", b"c", b"d"))

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
