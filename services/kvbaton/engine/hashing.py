"""Names for the KV of a prefix.

A full block is known by a digest over everything up to its end: cache salt, and all tokens from the first. One running
BLAKE2b over the sequence gives the digest of each block in turn, so a digest depends on its predecessor as in a chain
of hashes, and each token is hashed once in a request's life. It is a cryptographic hash: no client can make up a
prompt that is answered from the KV of another one.
"""

import hashlib
from array import array
from collections.abc import Sequence

DIGEST_BYTES = 16


class BlockHashes:
    """Digests of the leading full blocks of one growing sequence."""

    __slots__ = ("_running", "digests")

    def __init__(self, cache_salt: str) -> None:
        """Sequences with different salts have no digest in common."""
        salt = cache_salt.encode()
        # With its length, or a salt could spell the beginning of somebody's tokens.
        self._running = hashlib.blake2b(len(salt).to_bytes(4, "little") + salt, digest_size=DIGEST_BYTES)
        self.digests: list[bytes] = []

    def push(self, token_ids: Sequence[int]) -> None:
        """The next block holds `token_ids`."""
        self._running.update(array("I", token_ids))
        self.digests.append(self._running.digest())
