"""What a peer's settings change (RFC 9113, section 6.5.2)."""

from kvbaton.handoff.http2 import frames as h2
from kvbaton.handoff.http2.endpoint import Endpoint
from kvbaton.handoff.http2.frames import Code, ConnectionFault, Setting
from kvbaton.handoff.http2.windows import WindowOverflowError


def apply_setting(endpoint: Endpoint, identifier: int, value: int) -> None:
    """Do as one setting says; unknown ones say nothing. Raises ConnectionFault for a value that cannot be."""
    if identifier == Setting.HEADER_TABLE_SIZE:
        endpoint.codec.limit_table(value)
    elif identifier == Setting.ENABLE_PUSH and value > 1:
        raise ConnectionFault(Code.PROTOCOL_ERROR, f"ENABLE_PUSH of {value}")
    elif identifier == Setting.MAX_CONCURRENT_STREAMS:
        endpoint.max_streams = value
    elif identifier == Setting.INITIAL_WINDOW_SIZE:
        if value > h2.MAX_WINDOW:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE of {value}")
        _resize_windows(endpoint, value)
    elif identifier == Setting.MAX_FRAME_SIZE:
        if not h2.MIN_FRAME_BYTES <= value <= h2.MAX_FRAME_BYTES:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"MAX_FRAME_SIZE of {value}")
        endpoint.max_frame_bytes = value


def _resize_windows(endpoint: Endpoint, size: int) -> None:
    change = size - endpoint.peer_stream_window
    endpoint.peer_stream_window = size
    for stream in list(endpoint.streams.values()):
        try:
            stream.send_window.grow(change)
        except WindowOverflowError as error:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, str(error)) from error
        endpoint.on_window(stream)
