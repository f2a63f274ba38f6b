from kvbaton.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TransferRequest(_message.Message):
    __slots__ = ("header", "frame", "commit", "confirm")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    CONFIRM_FIELD_NUMBER: _ClassVar[int]
    header: KvHeader
    frame: KvFrame
    commit: KvCommit
    confirm: KvConfirm
    def __init__(self, header: _Optional[_Union[KvHeader, _Mapping]] = ..., frame: _Optional[_Union[KvFrame, _Mapping]] = ..., commit: _Optional[_Union[KvCommit, _Mapping]] = ..., confirm: _Optional[_Union[KvConfirm, _Mapping]] = ...) -> None: ...

class KvHeader(_message.Message):
    __slots__ = ("ticket", "attempt", "fingerprint", "geometry", "token_start", "token_stop", "transports", "host", "link_id", "encoding")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_STOP_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    attempt: int
    fingerprint: _types_pb2.ModelFingerprint
    geometry: _types_pb2.KvGeometry
    token_start: int
    token_stop: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    host: _types_pb2.HostIdentity
    link_id: bytes
    encoding: str
    def __init__(self, ticket: _Optional[bytes] = ..., attempt: _Optional[int] = ..., fingerprint: _Optional[_Union[_types_pb2.ModelFingerprint, _Mapping]] = ..., geometry: _Optional[_Union[_types_pb2.KvGeometry, _Mapping]] = ..., token_start: _Optional[int] = ..., token_stop: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., host: _Optional[_Union[_types_pb2.HostIdentity, _Mapping]] = ..., link_id: _Optional[bytes] = ..., encoding: _Optional[str] = ...) -> None: ...

class KvFrame(_message.Message):
    __slots__ = ("info", "payload", "reference")
    INFO_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    info: FrameInfo
    payload: bytes
    reference: KvReference
    def __init__(self, info: _Optional[_Union[FrameInfo, _Mapping]] = ..., payload: _Optional[bytes] = ..., reference: _Optional[_Union[KvReference, _Mapping]] = ...) -> None: ...

class KvReference(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: bytes
    def __init__(self, blocks: _Optional[bytes] = ...) -> None: ...

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

class KvConfirm(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TransferResponse(_message.Message):
    __slots__ = ("ready", "applied", "rejected", "copied")
    READY_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    ready: KvReady
    applied: KvApplied
    rejected: KvRejected
    copied: KvCopied
    def __init__(self, ready: _Optional[_Union[KvReady, _Mapping]] = ..., applied: _Optional[_Union[KvApplied, _Mapping]] = ..., rejected: _Optional[_Union[KvRejected, _Mapping]] = ..., copied: _Optional[_Union[KvCopied, _Mapping]] = ...) -> None: ...

class KvCopied(_message.Message):
    __slots__ = ("num_frames",)
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    num_frames: int
    def __init__(self, num_frames: _Optional[int] = ...) -> None: ...

class KvReady(_message.Message):
    __slots__ = ("transport", "window_start")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_START_FIELD_NUMBER: _ClassVar[int]
    transport: str
    window_start: int
    def __init__(self, transport: _Optional[str] = ..., window_start: _Optional[int] = ...) -> None: ...

class KvApplied(_message.Message):
    __slots__ = ("num_frames", "payload_bytes")
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_frames: int
    payload_bytes: int
    def __init__(self, num_frames: _Optional[int] = ..., payload_bytes: _Optional[int] = ...) -> None: ...

class KvRejected(_message.Message):
    __slots__ = ("reason", "link_ended")
    REASON_FIELD_NUMBER: _ClassVar[int]
    LINK_ENDED_FIELD_NUMBER: _ClassVar[int]
    reason: str
    link_ended: bool
    def __init__(self, reason: _Optional[str] = ..., link_ended: bool = ...) -> None: ...

class LinkRequest(_message.Message):
    __slots__ = ("hello", "probe", "chosen")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    hello: LinkHello
    probe: LinkProbe
    chosen: LinkChosen
    def __init__(self, hello: _Optional[_Union[LinkHello, _Mapping]] = ..., probe: _Optional[_Union[LinkProbe, _Mapping]] = ..., chosen: _Optional[_Union[LinkChosen, _Mapping]] = ...) -> None: ...

class LinkResponse(_message.Message):
    __slots__ = ("welcome", "probed")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PROBED_FIELD_NUMBER: _ClassVar[int]
    welcome: LinkWelcome
    probed: LinkProbed
    def __init__(self, welcome: _Optional[_Union[LinkWelcome, _Mapping]] = ..., probed: _Optional[_Union[LinkProbed, _Mapping]] = ...) -> None: ...

class LinkHello(_message.Message):
    __slots__ = ("incarnation", "host", "transports", "layout", "cuda_ipc_handle", "gpu_uuid")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_HANDLE_FIELD_NUMBER: _ClassVar[int]
    GPU_UUID_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    host: _types_pb2.HostIdentity
    transports: _containers.RepeatedScalarFieldContainer[str]
    layout: PoolLayout
    cuda_ipc_handle: bytes
    gpu_uuid: str
    def __init__(self, incarnation: _Optional[str] = ..., host: _Optional[_Union[_types_pb2.HostIdentity, _Mapping]] = ..., transports: _Optional[_Iterable[str]] = ..., layout: _Optional[_Union[PoolLayout, _Mapping]] = ..., cuda_ipc_handle: _Optional[bytes] = ..., gpu_uuid: _Optional[str] = ...) -> None: ...

class PoolLayout(_message.Message):
    __slots__ = ("num_bytes", "block_size", "num_blocks", "k_offsets", "v_offsets", "probe_offset", "probe_bytes")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    K_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    V_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    PROBE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    PROBE_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    block_size: int
    num_blocks: int
    k_offsets: _containers.RepeatedScalarFieldContainer[int]
    v_offsets: _containers.RepeatedScalarFieldContainer[int]
    probe_offset: int
    probe_bytes: int
    def __init__(self, num_bytes: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., k_offsets: _Optional[_Iterable[int]] = ..., v_offsets: _Optional[_Iterable[int]] = ..., probe_offset: _Optional[int] = ..., probe_bytes: _Optional[int] = ...) -> None: ...

class LinkWelcome(_message.Message):
    __slots__ = ("link_id", "incarnation", "host", "obstacles", "descriptor_socket")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    OBSTACLES_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_SOCKET_FIELD_NUMBER: _ClassVar[int]
    link_id: bytes
    incarnation: str
    host: _types_pb2.HostIdentity
    obstacles: _containers.RepeatedScalarFieldContainer[str]
    descriptor_socket: str
    def __init__(self, link_id: _Optional[bytes] = ..., incarnation: _Optional[str] = ..., host: _Optional[_Union[_types_pb2.HostIdentity, _Mapping]] = ..., obstacles: _Optional[_Iterable[str]] = ..., descriptor_socket: _Optional[str] = ...) -> None: ...

class LinkProbe(_message.Message):
    __slots__ = ("transport", "crc32c", "num_bytes", "payload")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    transport: str
    crc32c: int
    num_bytes: int
    payload: bytes
    def __init__(self, transport: _Optional[str] = ..., crc32c: _Optional[int] = ..., num_bytes: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class LinkProbed(_message.Message):
    __slots__ = ("problem", "seconds")
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    problem: str
    seconds: float
    def __init__(self, problem: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class LinkChosen(_message.Message):
    __slots__ = ("transport", "reason", "bytes_per_second")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    transport: str
    reason: str
    bytes_per_second: float
    def __init__(self, transport: _Optional[str] = ..., reason: _Optional[str] = ..., bytes_per_second: _Optional[float] = ...) -> None: ...
