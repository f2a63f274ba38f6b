from kvbaton.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_PREFILL: _ClassVar[WorkerRole]
    WORKER_ROLE_DECODE: _ClassVar[WorkerRole]
    WORKER_ROLE_UNIFIED: _ClassVar[WorkerRole]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_PREFILL: WorkerRole
WORKER_ROLE_DECODE: WorkerRole
WORKER_ROLE_UNIFIED: WorkerRole

class WatchStatusRequest(_message.Message):
    __slots__ = ("min_interval_seconds",)
    MIN_INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    min_interval_seconds: float
    def __init__(self, min_interval_seconds: _Optional[float] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetLimitsRequest(_message.Message):
    __slots__ = ("max_prefill_tokens", "max_decode_seqs", "target_itl_ms")
    MAX_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_DECODE_SEQS_FIELD_NUMBER: _ClassVar[int]
    TARGET_ITL_MS_FIELD_NUMBER: _ClassVar[int]
    max_prefill_tokens: int
    max_decode_seqs: int
    target_itl_ms: float
    def __init__(self, max_prefill_tokens: _Optional[int] = ..., max_decode_seqs: _Optional[int] = ..., target_itl_ms: _Optional[float] = ...) -> None: ...

class SetLimitsResponse(_message.Message):
    __slots__ = ("limits",)
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    limits: EngineLimits
    def __init__(self, limits: _Optional[_Union[EngineLimits, _Mapping]] = ...) -> None: ...

class EngineLimits(_message.Message):
    __slots__ = ("max_prefill_tokens", "max_decode_seqs", "target_itl_ms")
    MAX_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_DECODE_SEQS_FIELD_NUMBER: _ClassVar[int]
    TARGET_ITL_MS_FIELD_NUMBER: _ClassVar[int]
    max_prefill_tokens: int
    max_decode_seqs: int
    target_itl_ms: float
    def __init__(self, max_prefill_tokens: _Optional[int] = ..., max_decode_seqs: _Optional[int] = ..., target_itl_ms: _Optional[float] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("role", "incarnation", "model", "draining", "pool", "queues", "counters", "limits", "kv_port", "kv_endpoint", "links", "kv_encoding")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    QUEUES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    KV_PORT_FIELD_NUMBER: _ClassVar[int]
    KV_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    KV_ENCODING_FIELD_NUMBER: _ClassVar[int]
    role: WorkerRole
    incarnation: str
    model: _types_pb2.ModelInfo
    draining: bool
    pool: PoolStatus
    queues: QueueStatus
    counters: WorkerCounters
    limits: EngineLimits
    kv_port: int
    kv_endpoint: str
    links: _containers.RepeatedCompositeFieldContainer[PeerLink]
    kv_encoding: str
    def __init__(self, role: _Optional[_Union[WorkerRole, str]] = ..., incarnation: _Optional[str] = ..., model: _Optional[_Union[_types_pb2.ModelInfo, _Mapping]] = ..., draining: bool = ..., pool: _Optional[_Union[PoolStatus, _Mapping]] = ..., queues: _Optional[_Union[QueueStatus, _Mapping]] = ..., counters: _Optional[_Union[WorkerCounters, _Mapping]] = ..., limits: _Optional[_Union[EngineLimits, _Mapping]] = ..., kv_port: _Optional[int] = ..., kv_endpoint: _Optional[str] = ..., links: _Optional[_Iterable[_Union[PeerLink, _Mapping]]] = ..., kv_encoding: _Optional[str] = ...) -> None: ...

class PeerLink(_message.Message):
    __slots__ = ("endpoint", "transport", "reason", "bytes_per_second")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    transport: str
    reason: str
    bytes_per_second: float
    def __init__(self, endpoint: _Optional[str] = ..., transport: _Optional[str] = ..., reason: _Optional[str] = ..., bytes_per_second: _Optional[float] = ...) -> None: ...

class PoolStatus(_message.Message):
    __slots__ = ("block_size", "num_blocks", "num_free_blocks", "num_cached_blocks")
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    block_size: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    def __init__(self, block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_cached_blocks: _Optional[int] = ...) -> None: ...

class QueueStatus(_message.Message):
    __slots__ = ("num_waiting", "num_prefilling", "num_handing_off", "num_receiving", "num_decoding")
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILLING_FIELD_NUMBER: _ClassVar[int]
    NUM_HANDING_OFF_FIELD_NUMBER: _ClassVar[int]
    NUM_RECEIVING_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODING_FIELD_NUMBER: _ClassVar[int]
    num_waiting: int
    num_prefilling: int
    num_handing_off: int
    num_receiving: int
    num_decoding: int
    def __init__(self, num_waiting: _Optional[int] = ..., num_prefilling: _Optional[int] = ..., num_handing_off: _Optional[int] = ..., num_receiving: _Optional[int] = ..., num_decoding: _Optional[int] = ...) -> None: ...

class WorkerCounters(_message.Message):
    __slots__ = ("num_steps", "prefill_tokens_computed", "decode_tokens_computed", "kv_bytes_sent", "kv_bytes_received", "transfers_applied", "transfers_rejected", "requests_finished", "requests_cancelled", "prefix_tokens_queried", "prefix_tokens_hit", "requests_preempted", "requests_not_a_number")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKENS_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_APPLIED_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_REJECTED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_CANCELLED_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_QUERIED_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_HIT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PREEMPTED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_NOT_A_NUMBER_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    prefill_tokens_computed: int
    decode_tokens_computed: int
    kv_bytes_sent: int
    kv_bytes_received: int
    transfers_applied: int
    transfers_rejected: int
    requests_finished: int
    requests_cancelled: int
    prefix_tokens_queried: int
    prefix_tokens_hit: int
    requests_preempted: int
    requests_not_a_number: int
    def __init__(self, num_steps: _Optional[int] = ..., prefill_tokens_computed: _Optional[int] = ..., decode_tokens_computed: _Optional[int] = ..., kv_bytes_sent: _Optional[int] = ..., kv_bytes_received: _Optional[int] = ..., transfers_applied: _Optional[int] = ..., transfers_rejected: _Optional[int] = ..., requests_finished: _Optional[int] = ..., requests_cancelled: _Optional[int] = ..., prefix_tokens_queried: _Optional[int] = ..., prefix_tokens_hit: _Optional[int] = ..., requests_preempted: _Optional[int] = ..., requests_not_a_number: _Optional[int] = ...) -> None: ...
