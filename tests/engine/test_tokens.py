"""Token ids travel as little-endian uint32, four bytes each."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.tokens import pack_token_ids, unpack_token_ids

TOKEN_IDS = st.lists(st.integers(0, 2**32 - 1))


@given(token_ids=TOKEN_IDS)
def test_what_was_packed_comes_back(token_ids: list[int]) -> None:
    assert unpack_token_ids(pack_token_ids(token_ids), "prompt") == token_ids


@given(token_ids=TOKEN_IDS)
def test_the_layout_is_struct_s(token_ids: list[int]) -> None:
    assert pack_token_ids(token_ids) == struct.pack(f"<{len(token_ids)}I", *token_ids)


def test_the_layout_is_this_one() -> None:
    assert pack_token_ids([1, 0x01020304]) == b"\x01\x00\x00\x00\x04\x03\x02\x01"


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_an_id_beyond_uint32_is_no_token(token_id: int) -> None:
    with pytest.raises(OverflowError):
        pack_token_ids([token_id])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 4097])
def test_half_a_token_is_refused_by_name(length: int) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        unpack_token_ids(bytes(length), "prompt_token_ids")
    assert caught.value.field == "prompt_token_ids"
    assert f"{length} bytes" in str(caught.value)
