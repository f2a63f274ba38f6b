from kvbaton.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TransferRequest(_message.Message):
    __slots__ = ("header", "frame", "commit")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    header: KvHeader
    frame: KvFrame
    commit: KvCommit
    def __init__(self, header: _Optional[_Union[KvHeader, _Mapping]] = ..., frame: _Optional[_Union[KvFrame, _Mapping]] = ..., commit: _Optional[_Union[KvCommit, _Mapping]] = ...) -> None: ...

class KvHeader(_message.Message):
    __slots__ = ("ticket", "attempt", "fingerprint", "geometry", "token_start", "token_stop", "transports", "host")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_STOP_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    attempt: int
    fingerprint: _types_pb2.ModelFingerprint
    geometry: _types_pb2.KvGeometry
    token_start: int
    token_stop: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    host: _types_pb2.HostIdentity
    def __init__(self, ticket: _Optional[bytes] = ..., attempt: _Optional[int] = ..., fingerprint: _Optional[_Union[_types_pb2.ModelFingerprint, _Mapping]] = ..., geometry: _Optional[_Union[_types_pb2.KvGeometry, _Mapping]] = ..., token_start: _Optional[int] = ..., token_stop: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., host: _Optional[_Union[_types_pb2.HostIdentity, _Mapping]] = ...) -> None: ...

class KvFrame(_message.Message):
    __slots__ = ("info", "payload")
    INFO_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    info: FrameInfo
    payload: bytes
    def __init__(self, info: _Optional[_Union[FrameInfo, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class FrameInfo(_message.Message):
    __slots__ = ("number", "attempt", "layer_start", "layer_stop", "token_start", "token_stop", "crc32c")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    LAYER_STOP_FIELD_NUMBER: _ClassVar[int]
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_STOP_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    number: int
    attempt: int
    layer_start: int
    layer_stop: int
    token_start: int
    token_stop: int
    crc32c: int
    def __init__(self, number: _Optional[int] = ..., attempt: _Optional[int] = ..., layer_start: _Optional[int] = ..., layer_stop: _Optional[int] = ..., token_start: _Optional[int] = ..., token_stop: _Optional[int] = ..., crc32c: _Optional[int] = ...) -> None: ...

class KvCommit(_message.Message):
    __slots__ = ("first_token_id", "num_frames", "payload_bytes", "digest")
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    first_token_id: int
    num_frames: int
    payload_bytes: int
    digest: bytes
    def __init__(self, first_token_id: _Optional[int] = ..., num_frames: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class TransferResponse(_message.Message):
    __slots__ = ("ready", "applied", "rejected")
    READY_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    ready: KvReady
    applied: KvApplied
    rejected: KvRejected
    def __init__(self, ready: _Optional[_Union[KvReady, _Mapping]] = ..., applied: _Optional[_Union[KvApplied, _Mapping]] = ..., rejected: _Optional[_Union[KvRejected, _Mapping]] = ...) -> None: ...

class KvReady(_message.Message):
    __slots__ = ("transport",)
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    transport: str
    def __init__(self, transport: _Optional[str] = ...) -> None: ...

class KvApplied(_message.Message):
    __slots__ = ("num_frames", "payload_bytes")
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_frames: int
    payload_bytes: int
    def __init__(self, num_frames: _Optional[int] = ..., payload_bytes: _Optional[int] = ...) -> None: ...

class KvRejected(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...
