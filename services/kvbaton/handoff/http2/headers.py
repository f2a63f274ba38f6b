"""gRPC's headers and trailers, and their compression (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md). Pure."""

import base64
import binascii
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import grpc
from hpack import Decoder, Encoder, HPACKError, OversizedHeaderListError

from kvbaton.handoff.http2.frames import Code, ConnectionFault

MAX_HEADER_BYTES = 16_384
"""Longest header list that is taken, compressed or not."""

CONTENT_TYPE = "application/grpc"
_TABLE_BYTES = 4096
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_MAX_TIMEOUT = 10**8 - 1
_CODES = {code.value[0]: code for code in grpc.StatusCode}

Headers = Sequence[tuple[str, str]]
"""As they came."""

NewHeaders = Sequence[tuple[str, str] | tuple[str, str, bool]]
"""To be sent. A third element says that the value is different each time and not worth remembering."""


class HeaderError(ValueError):
    """Headers that are no gRPC call's."""


class HeaderCodec:
    """HPACK for one connection, both directions."""

    def __init__(self) -> None:
        self._encoder = Encoder()
        self._decoder = Decoder(MAX_HEADER_BYTES)

    def limit_table(self, size: int) -> None:
        """The peer's decoder remembers at most `size` bytes."""
        self._encoder.header_table_size = min(size, _TABLE_BYTES)

    def encode(self, headers: NewHeaders) -> bytes:
        """A header block."""
        return self._encoder.encode(headers, huffman=False)

    def decode(self, block: bytes) -> Headers:
        """Raises ConnectionFault: after a block that was not understood no other one can be."""
        try:
            return [(_text(name), _text(value)) for name, value in self._decoder.decode(block, raw=True)]
        except OversizedHeaderListError as error:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "headers are too long") from error
        except (HPACKError, IndexError, ValueError) as error:
            raise ConnectionFault(Code.COMPRESSION_ERROR, "a header block cannot be read") from error


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


@dataclass(frozen=True, slots=True)
class Call:
    """What a client's headers ask for."""

    method: str
    """/package.Service/Method"""
    timeout: float | None
    """Seconds that the caller waits."""
    metadata: Headers


def request_headers(
    authority: str, method: str, timeout: float | None, metadata: Iterable[tuple[str, str | bytes]]
) -> NewHeaders:
    """The headers that open a call."""
    headers: list[tuple[str, str] | tuple[str, str, bool]] = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", CONTENT_TYPE),
        ("user-agent", "kvbaton"),
    ]
    if timeout is not None:
        headers.append(("grpc-timeout", format_timeout(timeout), True))
    for name, value in metadata:
        shown = value if isinstance(value, str) else base64.b64encode(value).decode()
        headers.append((name.lower(), shown, True))
    return headers


def parse_request(headers: Headers) -> Call:
    """Inverse of `request_headers`, for any client's. Raises HeaderError."""
    pseudo: dict[str, str] = {}
    metadata: list[tuple[str, str]] = []
    for name, value in headers:
        if not name.startswith(":"):
            metadata.append((name, value))
        elif metadata or name in pseudo:
            raise HeaderError(f"{name} is in the wrong place")
        else:
            pseudo[name] = value
    regular = dict(metadata)
    if pseudo.get(":method") != "POST" or not pseudo.get(":path", "").startswith("/"):
        raise HeaderError("no POST to a path")
    content_type = regular.get("content-type", "")
    if not re.fullmatch(r"application/grpc([+;].*)?", content_type):
        raise HeaderError(f"content-type {content_type[:100]!r}")
    timeout = regular.get("grpc-timeout")
    return Call(pseudo[":path"], None if timeout is None else parse_timeout(timeout), metadata)


def format_timeout(seconds: float) -> str:
    """gRPC's at most eight digits and a unit, never less than `seconds`, and at least a nanosecond."""
    seconds = max(seconds, 1e-9)
    for unit in "numSMH":
        count = math.ceil(seconds / _UNITS[unit])
        if count <= _MAX_TIMEOUT:
            return f"{count}{unit}"
    return f"{_MAX_TIMEOUT}H"


def parse_timeout(text: str) -> float:
    """Seconds. Raises HeaderError."""
    if not re.fullmatch(r"[0-9]{1,8}[HMSmun]", text):
        raise HeaderError(f"grpc-timeout {text[:20]!r}")
    return int(text[:-1]) * _UNITS[text[-1]]


RESPONSE_HEADERS: Headers = [(":status", "200"), ("content-type", CONTENT_TYPE)]


def trailers(code: grpc.StatusCode, message: str, metadata: Iterable[tuple[str, str | bytes]]) -> NewHeaders:
    """How a call ends."""
    ending: list[tuple[str, str] | tuple[str, str, bool]] = [("grpc-status", str(code.value[0]))]
    if message:
        ending.append(("grpc-message", encode_message(message), True))
    for name, value in metadata:
        shown = value if isinstance(value, str) else base64.b64encode(value).decode()
        ending.append((name, shown, True))
    return ending


def parse_trailers(headers: Headers) -> tuple[grpc.StatusCode, str, list[tuple[str, str | bytes]]]:
    """Code, message and metadata that a call ended with. A peer that gives no status has not spoken gRPC: UNKNOWN."""
    metadata: list[tuple[str, str | bytes]] = []
    status, message = "", ""
    for name, value in headers:
        if name == "grpc-status":
            status = value
        elif name == "grpc-message":
            message = decode_message(value)
        elif name.endswith("-bin"):
            metadata.append((name, _decode_binary(value)))
        elif not name.startswith(":"):
            metadata.append((name, value))
    if not re.fullmatch(r"[0-9]{1,9}", status):
        http = dict(headers).get(":status", "200")
        return grpc.StatusCode.UNKNOWN, f"no grpc-status (HTTP status {http[:10]})", metadata
    return _CODES.get(int(status), grpc.StatusCode.UNKNOWN), message, metadata


def encode_message(text: str) -> str:
    """Percent-encoding of all but printable ASCII, and of the percent sign."""
    return "".join(
        chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}" for byte in text.encode(errors="replace")
    )


def decode_message(text: str) -> str:
    """Inverse of `encode_message`; what is no valid encoding is kept as it is."""
    return unquote_to_bytes(text.encode("latin-1")).decode(errors="replace")


def _decode_binary(value: str) -> bytes:
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4))
    except (binascii.Error, ValueError):
        return b""
