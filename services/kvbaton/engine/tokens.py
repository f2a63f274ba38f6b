"""Token ids as they travel: packed uint32, little-endian."""

import sys
from array import array
from collections.abc import Iterable, Sequence

from kvbaton.engine.errors import InvalidArgumentError

_TYPECODE = "I"
assert array(_TYPECODE).itemsize == 4


def pack_token_ids(token_ids: Iterable[int]) -> bytes:
    """Four bytes a token. Raises OverflowError for an id outside uint32."""
    packed = array(_TYPECODE, token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def check_token_ids(token_ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Raises InvalidArgumentError naming `field` when there is no token, or one that the model does not have."""
    if not token_ids:
        raise InvalidArgumentError(field, "is empty")
    largest = max(token_ids)
    if largest >= vocab_size:
        raise InvalidArgumentError(field, f"token id {largest} is not below {vocab_size}")


def unpack_token_ids(data: bytes, field: str) -> list[int]:
    """Inverse of `pack_token_ids`. Raises InvalidArgumentError naming `field` when the length is not whole."""
    if len(data) % 4:
        raise InvalidArgumentError(field, f"{len(data)} bytes are not whole uint32 token ids")
    packed = array(_TYPECODE)
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()
