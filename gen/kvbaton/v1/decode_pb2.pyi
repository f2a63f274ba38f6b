from kvbaton.v1 import types_pb2 as _types_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecodeRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "sampling", "output_token_ids", "prefill_locally", "priority", "cache_salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LOCALLY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: bytes
    sampling: _types_pb2.SamplingParams
    output_token_ids: bytes
    prefill_locally: bool
    priority: int
    cache_salt: str
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., output_token_ids: _Optional[bytes] = ..., prefill_locally: bool = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("admitted", "tokens", "finished", "preempted", "prompt_logprobs")
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    admitted: DecodeAdmitted
    tokens: _types_pb2.TokenEvent
    finished: DecodeFinished
    preempted: DecodePreempted
    prompt_logprobs: _types_pb2.PromptLogprobs
    def __init__(self, admitted: _Optional[_Union[DecodeAdmitted, _Mapping]] = ..., tokens: _Optional[_Union[_types_pb2.TokenEvent, _Mapping]] = ..., finished: _Optional[_Union[DecodeFinished, _Mapping]] = ..., preempted: _Optional[_Union[DecodePreempted, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_types_pb2.PromptLogprobs, _Mapping]] = ...) -> None: ...

class DecodePreempted(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class DecodeAdmitted(_message.Message):
    __slots__ = ("ticket", "num_cached_tokens", "kv_port", "kv_endpoint", "host", "wait_seconds")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_PORT_FIELD_NUMBER: _ClassVar[int]
    KV_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    num_cached_tokens: int
    kv_port: int
    kv_endpoint: str
    host: _types_pb2.HostIdentity
    wait_seconds: float
    def __init__(self, ticket: _Optional[bytes] = ..., num_cached_tokens: _Optional[int] = ..., kv_port: _Optional[int] = ..., kv_endpoint: _Optional[str] = ..., host: _Optional[_Union[_types_pb2.HostIdentity, _Mapping]] = ..., wait_seconds: _Optional[float] = ...) -> None: ...

class DecodeFinished(_message.Message):
    __slots__ = ("wait_seconds", "decode_seconds", "prefill_queue_seconds", "prefill_compute_seconds", "cached_tokens")
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    wait_seconds: float
    decode_seconds: float
    prefill_queue_seconds: float
    prefill_compute_seconds: float
    cached_tokens: int
    def __init__(self, wait_seconds: _Optional[float] = ..., decode_seconds: _Optional[float] = ..., prefill_queue_seconds: _Optional[float] = ..., prefill_compute_seconds: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...
