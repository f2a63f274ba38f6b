"""What the asynchronous and the synchronous client share: requests out, events in. No calls are made here."""

import operator
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from kvbaton.client._errors import RequestCancelledError, ServiceError
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types

PromptLike = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages such as `{"role": "user", "content": "…"}`."""

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # gRPC waits for the longer of the two, and its own default is a minute.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 16 << 20),
)
_LONGEST_TIMEOUT = 1e9
"""Seconds; beyond it gRPC's clock would overflow."""
METHODS = "/kvbaton.v1.InferenceService/"

_FINISH_REASONS = {types.FINISH_REASON_STOP: "stop", types.FINISH_REASON_LENGTH: "length"}


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`; what is left out takes the service's default."""

    model: str
    """Name of a served model. Default: the only one."""
    max_tokens: int
    """Most tokens to generate."""
    temperature: float
    """0 is greedy, the default."""
    top_k: int
    """Keep the k most likely tokens."""
    top_p: float
    """Keep the smallest set of tokens with this much probability."""
    seed: int
    """Makes a sampled answer repeatable."""
    stop_token_ids: Sequence[int]
    """Token ids that end the answer."""
    ignore_eos: bool
    """Go on after the model's end-of-sequence token."""
    request_id: str
    """Name of the request in the service's logs and traces."""
    timeout: float
    """Seconds until the call ends with DeadlineExceededError."""
    metadata: Sequence[tuple[str, str]]
    """gRPC metadata to send along, for example a traceparent."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens that arrived together: usually one, more when the reader was behind."""

    index: int
    """Index of the first of them in the answer."""
    token_ids: tuple[int, ...]
    text: str
    """Text that became certain with them; may be empty."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """"stop" or "length"."""
    usage: Usage
    timings: types.Timings
    """Where the time went, in seconds."""
    request_id: str
    model: str
    seed: int
    prefill_worker: str
    decode_worker: str


def build_prompt(prompt: PromptLike) -> pb.Prompt:
    """The protobuf form of any kind of prompt. Raises TypeError or ValueError for something else."""
    if isinstance(prompt, str):
        return pb.Prompt(text=prompt)
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
        raise TypeError(f"prompt must be text, token ids, or messages, not {type(prompt).__name__}")
    items = list(prompt)
    token_ids = _as_token_ids(items)
    if token_ids is not None:
        return pb.Prompt(tokens=pb.TokenPrompt(token_ids=pack_token_ids(token_ids)))
    messages = []
    for item in items:
        # Protobuf would take None for an empty text.
        if not (isinstance(item, Mapping) and set(item) == {"role", "content"} and _all_text(item)):
            raise TypeError("prompt must be text, token ids, or messages with 'role' and 'content', both text")
        messages.append(pb.ChatMessage(role=item["role"], content=item["content"]))
    return pb.Prompt(chat=pb.ChatPrompt(messages=messages))


def _as_token_ids(items: Sequence[Any]) -> list[int] | None:
    # Whatever counts as an integer is one, numpy's included; a bool is a mistake.
    if not all(hasattr(item, "__index__") and not isinstance(item, bool) for item in items):
        return None
    return [operator.index(item) for item in items]


def _all_text(message: Mapping[str, object]) -> bool:
    return all(isinstance(value, str) for value in message.values())


def build_request(prompt: PromptLike, options: GenerateOptions) -> pb.GenerateRequest:
    """The request of a `generate` call. Raises TypeError or ValueError for values that protobuf cannot hold."""
    unknown = sorted(set(options) - GenerateOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"generate() has no option {', '.join(unknown)}")
    sampling = types.SamplingParams(
        stop_token_ids=options.get("stop_token_ids", ()), ignore_eos=options.get("ignore_eos", False)
    )
    for name in ("max_tokens", "temperature", "top_k", "top_p", "seed"):
        if name in options:
            setattr(sampling, name, options[name])
    return pb.GenerateRequest(
        model=options.get("model", ""),
        prompt=build_prompt(prompt),
        sampling=sampling,
        request_id=options.get("request_id", ""),
    )


def deadline(options: GenerateOptions) -> float | None:
    """The call's timeout in seconds, as gRPC takes it: no deadline for one that is practically infinite."""
    timeout = options.get("timeout")
    return None if timeout is None or timeout > _LONGEST_TIMEOUT else timeout


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Packed uint32, little-endian. Raises ValueError for ids outside it."""
    try:
        packed = array("I", token_ids)
    except OverflowError as error:
        raise ValueError(f"a token id is not between 0 and 2**32 - 1: {error}") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_token_ids(data: bytes) -> list[int]:
    """Inverse of `pack_token_ids`."""
    packed = array("I")
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


class Assembly:
    """Collects one answer from its events."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._finished: pb.GenerateFinished | None = None
        self._closed = False

    def close(self) -> None:
        """The reader has left; what is missing will not come."""
        self._closed = True

    def add(self, response: pb.GenerateResponse) -> Chunk | None:
        """Take in an event; the chunk if it carried tokens. Raises ServiceError when tokens are missing."""
        if response.HasField("finished"):
            self._finished = response.finished
            return None
        event = response.tokens
        if event.first_index != len(self._token_ids):
            raise ServiceError(f"token {event.first_index} came where {len(self._token_ids)} was next")
        self._texts.append(event.text)
        self._token_ids.extend(event.token_ids)
        return Chunk(event.first_index, tuple(event.token_ids), event.text)

    def result(self) -> GenerationResult:
        """The whole answer. Raises ServiceError when the stream ended before it was whole, or RequestCancelledError."""
        finished = self._finished
        if finished is None and self._closed:
            raise RequestCancelledError("the generation was closed before its end")
        if finished is None:
            raise ServiceError("the stream ended without a result")
        usage = finished.usage
        return GenerationResult(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=_FINISH_REASONS.get(finished.finish_reason, "unknown"),
            usage=Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
            timings=finished.timings,
            request_id=finished.request_id,
            model=finished.model,
            seed=finished.seed,
            prefill_worker=finished.prefill_worker,
            decode_worker=finished.decode_worker,
        )
