"""A block's digest stands for everything up to its end, and for nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine.hashing import DIGEST_BYTES, BlockHashes

BLOCKS = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), max_size=4)


def digests(blocks: list[list[int]], salt: str = "") -> list[bytes]:
    hashes = BlockHashes(salt)
    for block in blocks:
        hashes.push(block)
    return hashes.digests


@given(one=BLOCKS, other=BLOCKS)
def test_digests_are_equal_as_far_as_the_tokens_are(one: list[list[int]], other: list[list[int]]) -> None:
    for index, (left, right) in enumerate(zip(digests(one), digests(other), strict=False)):
        assert (left == right) == (one[: index + 1] == other[: index + 1])
        assert len(left) == DIGEST_BYTES


def test_salts_keep_sequences_apart() -> None:
    salts = ["", "a", "b", "a" * 300, "\N{SNOWMAN}"]
    assert len({digests([[1, 2]], salt)[0] for salt in salts}) == len(salts)


def test_a_salt_cannot_spell_tokens() -> None:
    # "\x01\x00\x00\x00" is how token 1 travels to the hash.
    assert digests([[2, 3]], "\x01\x00\x00\x00")[0] != digests([[1, 2], [3, 3]], "")[0]
    assert digests([[1, 1]], "")[0] != digests([[1, 1]], "\x00")[0]
