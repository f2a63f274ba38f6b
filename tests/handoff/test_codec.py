"""Our frames are protobuf's: the generated classes read what we write and write what we read, and nothing that comes
over a wire does more harm than a WireError.
"""

import itertools
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.handoff.codec import (
    Frame,
    RunningDigest,
    WireError,
    crc32c,
    decode_message,
    encode_frame,
    encode_message,
)
from kvbaton.v1 import kv_transfer_pb2 as pb

uint32 = st.integers(0, 2**32 - 1)
infos = st.builds(
    pb.FrameInfo,
    number=uint32,
    attempt=uint32,
    layer_start=uint32,
    layer_stop=uint32,
    token_start=uint32,
    token_stop=uint32,
    crc32c=uint32,
)
headers = st.builds(
    pb.KvHeader, ticket=st.binary(max_size=20), attempt=uint32, transports=st.lists(st.text(max_size=5), max_size=3)
)
commits = st.builds(pb.KvCommit, first_token_id=uint32, num_frames=uint32, digest=st.binary(max_size=20))


def varint(value: int) -> bytes:
    encoded = b""
    while value > 0x7F:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def delimited(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


@st.composite
def unknown_fields(draw: st.DrawFn) -> bytes:
    key = draw(st.integers(100, 1000)) << 3
    return draw(
        st.one_of(
            st.integers(0, 2**64 - 1).map(lambda value: varint(key) + varint(value)),
            st.binary(min_size=8, max_size=8).map(lambda content: varint(key | 1) + content),
            st.binary(max_size=9).map(lambda content: varint(key | 2) + varint(len(content)) + content),
            st.binary(min_size=4, max_size=4).map(lambda content: varint(key | 5) + content),
        )
    )


@given(infos, st.lists(st.binary(max_size=300), max_size=4))
def test_the_generated_classes_read_our_frames(info: pb.FrameInfo, parts: list[bytes]) -> None:
    request = pb.TransferRequest.FromString(encode_frame(info, [memoryview(part) for part in parts]))
    assert request.WhichOneof("message") == "frame"
    assert request.frame.info == info
    assert request.frame.payload == b"".join(parts)


@given(infos, st.binary(min_size=1, max_size=300))
def test_we_read_the_frames_of_the_generated_classes(info: pb.FrameInfo, payload: bytes) -> None:
    encoded = pb.TransferRequest(frame=pb.KvFrame(info=info, payload=payload)).SerializeToString()
    frame = decode_message(encoded)
    assert isinstance(frame, Frame)
    assert frame.info == info
    assert frame.payload == payload
    assert frame.payload.obj is encoded, "the payload was copied"


@given(st.one_of(headers, commits))
def test_headers_and_commits_go_there_and_back(message: pb.KvHeader | pb.KvCommit) -> None:
    assert decode_message(encode_message(message)) == message


@given(infos, st.binary(max_size=50), st.lists(unknown_fields(), min_size=3, max_size=3), st.booleans())
def test_fields_may_come_in_any_order_among_unknown_ones(
    info: pb.FrameInfo, payload: bytes, unknown: list[bytes], info_first: bool
) -> None:
    fields = [delimited(1, info.SerializeToString()), delimited(2, payload)]
    first, second = fields if info_first else reversed(fields)
    encoded = unknown[0] + delimited(2, unknown[1] + first + unknown[1] + second + unknown[1]) + unknown[2]
    assert pb.TransferRequest.FromString(encoded).frame.info == info
    frame = decode_message(encoded)
    assert isinstance(frame, Frame)
    assert frame.info == info
    assert frame.payload == payload


@given(st.binary(max_size=200))
def test_garbage_is_a_wire_error_or_a_message_that_protobuf_reads_too(data: bytes) -> None:
    try:
        message = decode_message(data)
    except WireError:
        return
    request = pb.TransferRequest.FromString(data)
    kind = request.WhichOneof("message")
    if isinstance(message, Frame):
        assert kind == "frame"
        assert request.frame.payload == message.payload
    else:
        assert kind is not None
        assert getattr(request, kind) == message


@given(infos, st.binary(max_size=40), st.data())
def test_a_frame_with_one_byte_changed_raises_nothing_but_wire_errors(
    info: pb.FrameInfo, payload: bytes, data: st.DataObject
) -> None:
    encoded = bytearray(encode_frame(info, [payload]))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = decode_message(bytes(encoded))
    except WireError:
        return
    assert isinstance(message, Frame | pb.KvHeader | pb.KvCommit | pb.KvConfirm)


def test_every_truncation_is_refused() -> None:
    encoded = encode_frame(pb.FrameInfo(number=300, crc32c=5), [b"payload" * 30])
    for length in range(len(encoded)):
        with pytest.raises(WireError):
            decode_message(encoded[:length])


@pytest.mark.parametrize("claim", [2**32, 2**40, 2**63, 2**64 - 1])
def test_a_length_claim_is_refused_without_an_allocation(claim: int) -> None:
    outer = varint(2 << 3 | 2) + varint(claim) + b"x"
    inner = delimited(2, varint(2 << 3 | 2) + varint(claim) + b"x")
    tracemalloc.start()
    try:
        for data in (outer, inner):
            with pytest.raises(WireError, match=f"claims {claim} bytes, 1 are left"):
                decode_message(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


HEADER, FRAME, COMMIT = delimited(1, b""), delimited(2, b""), delimited(3, b"")


@pytest.mark.parametrize("pair", list(itertools.product((HEADER, FRAME, COMMIT), repeat=2)))
def test_two_messages_in_one_request_are_refused(pair: tuple[bytes, bytes]) -> None:
    with pytest.raises(WireError, match="holds one message, not 2"):
        decode_message(b"".join(pair))


def test_an_empty_request_is_refused() -> None:
    with pytest.raises(WireError, match="not 0"):
        decode_message(b"")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x00\x00", "field number 0"),
        (HEADER + varint(1 << 32) + b"\x00", "field number 536870912"),
        (b"\x0b", "wire type 3"),
        (b"\xff" * 11, "more than ten bytes"),
        (b"\x0d\x01\x02", "ends within a field"),
        (b"\x80", "ends within a number"),
        (delimited(1, b"\xff"), "KvHeader cannot be parsed"),
        (delimited(3, b"\x08"), "KvCommit cannot be parsed"),
        (delimited(2, delimited(1, b"\xff")), "FrameInfo cannot be parsed"),
    ],
)
def test_malformed_bytes_are_refused_with_their_problem(data: bytes, problem: str) -> None:
    with pytest.raises(WireError, match=problem):
        decode_message(data)


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"123456789", 0xE3069283),
        (b"", 0),
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_crc32c_is_castagnolis(data: bytes, checksum: int) -> None:
    assert crc32c([data]) == checksum


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_crc32c_of_parts_is_that_of_their_whole(parts: list[bytes]) -> None:
    assert crc32c([memoryview(part) for part in parts]) == crc32c([b"".join(parts)])


def digest(*added: pb.FrameInfo, first_token: int = 7) -> bytes:
    running = RunningDigest()
    for info in added:
        running.add(info)
    return running.value(first_token)


@pytest.mark.parametrize("field", ["number", "layer_start", "layer_stop", "token_start", "token_stop", "crc32c"])
def test_the_digest_changes_with_every_field(field: str) -> None:
    values: dict[str, Any] = {"number": 1, "layer_start": 2, "layer_stop": 3, "token_start": 4, "token_stop": 5}
    changed = {**values, field: 77}
    assert digest(pb.FrameInfo(**values)) != digest(pb.FrameInfo(**changed))
    assert digest(pb.FrameInfo(**values)) == digest(pb.FrameInfo(**values, attempt=9)), "an attempt is no content"


def test_the_digest_changes_with_order_and_number_of_frames() -> None:
    first, second = pb.FrameInfo(number=1), pb.FrameInfo(number=2)
    values = {digest(), digest(first), digest(second), digest(first, second), digest(second, first)}
    values.add(digest(first, first_token=8))
    assert len(values) == 6
    assert {len(value) for value in values} == {16}
