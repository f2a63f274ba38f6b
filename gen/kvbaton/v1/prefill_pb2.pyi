from kvbaton.v1 import types_pb2 as _types_pb2
from kvbaton.v1 import worker_pb2 as _worker_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConnectPeerRequest(_message.Message):
    __slots__ = ("endpoint", "incarnation")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    incarnation: str
    def __init__(self, endpoint: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

class ConnectPeerResponse(_message.Message):
    __slots__ = ("link",)
    LINK_FIELD_NUMBER: _ClassVar[int]
    link: _worker_pb2.PeerLink
    def __init__(self, link: _Optional[_Union[_worker_pb2.PeerLink, _Mapping]] = ...) -> None: ...

class TransferTarget(_message.Message):
    __slots__ = ("endpoint", "ticket", "attempt", "num_cached_tokens")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    ticket: bytes
    attempt: int
    num_cached_tokens: int
    def __init__(self, endpoint: _Optional[str] = ..., ticket: _Optional[bytes] = ..., attempt: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "sampling", "target", "output_token_ids", "priority", "cache_salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: bytes
    sampling: _types_pb2.SamplingParams
    target: TransferTarget
    output_token_ids: bytes
    priority: int
    cache_salt: str
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., target: _Optional[_Union[TransferTarget, _Mapping]] = ..., output_token_ids: _Optional[bytes] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("first_token", "finished", "prompt_logprobs")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    first_token: _types_pb2.TokenEvent
    finished: PrefillFinished
    prompt_logprobs: _types_pb2.PromptLogprobs
    def __init__(self, first_token: _Optional[_Union[_types_pb2.TokenEvent, _Mapping]] = ..., finished: _Optional[_Union[PrefillFinished, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_types_pb2.PromptLogprobs, _Mapping]] = ...) -> None: ...

class PrefillFinished(_message.Message):
    __slots__ = ("queue_seconds", "compute_seconds", "cached_tokens", "transfer")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    compute_seconds: float
    cached_tokens: int
    transfer: _types_pb2.TransferStats
    def __init__(self, queue_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., transfer: _Optional[_Union[_types_pb2.TransferStats, _Mapping]] = ...) -> None: ...
