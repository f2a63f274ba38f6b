"""What the asynchronous and the synchronous client send: prompts and options as protobuf. No calls are made here."""

import json
import operator
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types

PromptLike = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages such as `{"role": "user", "content": "…"}`."""

_LONGEST_TIMEOUT = 1e9
"""Seconds; beyond it gRPC's clock would overflow."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`; what is left out takes the service's default. docs/sampling.md says more."""

    model: str
    """Name of a served model. Default: the only one."""
    max_tokens: int
    """Most tokens to generate."""
    min_tokens: int
    """Neither the end-of-sequence token nor a stop ends the answer before it has this many tokens."""
    temperature: float
    """0 is greedy, the default."""
    top_k: int
    """Keep the k most likely tokens."""
    top_p: float
    """Keep the smallest set of tokens with this much probability."""
    min_p: float
    """Keep tokens at least this likely, relative to the most likely one."""
    presence_penalty: float
    """Taken from the logit of every token that the answer has already."""
    frequency_penalty: float
    """Taken from a token's logit once for each time that the answer has it."""
    repetition_penalty: float
    """Makes tokens that the prompt or the answer has less likely; 1 does not."""
    logit_bias: Mapping[int, float]
    """Added to the logits of these token ids."""
    allowed_token_ids: Sequence[int]
    """Nothing but these can be sampled."""
    banned_token_ids: Sequence[int]
    """These are never sampled."""
    seed: int
    """Makes a sampled answer repeatable."""
    n: int
    """Answers to the same prompt; `GenerationResult.sequences` has them all."""
    stop: str | Sequence[str]
    """Text that ends the answer, one or several."""
    include_stop_in_output: bool
    """Whether the text ends with the stop string, and not before it."""
    stop_token_ids: Sequence[int]
    """Token ids that end the answer."""
    ignore_eos: bool
    """Go on after the model's end-of-sequence token."""
    logprobs: int
    """Report each token's logprob and those of this many most likely ones."""
    prompt_logprobs: int
    """The same for the prompt's tokens from the second on."""
    json_schema: str | Mapping[str, Any]
    """The answer is JSON that this schema, given as JSON text or as the object itself, describes."""
    json_object: bool
    """The answer is a JSON object."""
    regex: str
    """The whole answer matches this regular expression."""
    choice: Sequence[str]
    """The answer is one of these."""
    grammar: str
    """The answer follows this context-free grammar."""
    priority: int
    """Lower numbers go first where requests wait."""
    cache_salt: str
    """Cached prompts are shared only among requests of the same salt."""
    request_id: str
    """Name of the request in the service's logs and traces."""
    timeout: float
    """Seconds until the call ends with DeadlineExceededError."""
    metadata: Sequence[tuple[str, str]]
    """gRPC metadata to send along, for example a traceparent."""


_SAMPLING = (
    *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "n", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "prompt_logprobs"),
    "include_stop_in_output",
)
_LISTS = ("stop_token_ids", "allowed_token_ids", "banned_token_ids")
_FORMS = ("json_schema", "json_object", "regex", "choice", "grammar")


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
    given: dict[str, Any] = dict(options)
    sampling = types.SamplingParams(**{name: given[name] for name in _LISTS if name in given})
    for name in _SAMPLING:
        if name in given:
            try:
                setattr(sampling, name, given[name])
            except (TypeError, ValueError) as error:
                # Protobuf's own message does not say which.
                raise type(error)(f"{name}: {error}") from error
    stop = given.get("stop", ())
    sampling.stop.extend([stop] if isinstance(stop, str) else stop)
    for token_id, bias in given.get("logit_bias", {}).items():
        sampling.logit_bias[token_id] = bias
    form = _structured_output(given)
    if form is not None:
        sampling.structured_output.CopyFrom(form)
    return pb.GenerateRequest(
        model=options.get("model", ""),
        prompt=build_prompt(prompt),
        sampling=sampling,
        request_id=options.get("request_id", ""),
        priority=options.get("priority", 0),
        cache_salt=options.get("cache_salt", ""),
    )


def _structured_output(given: Mapping[str, Any]) -> types.StructuredOutput | None:
    forms = [name for name in _FORMS if name in given]
    if not forms:
        return None
    if len(forms) > 1:
        raise ValueError(f"{' and '.join(forms)} are given; an answer has one form")
    [name], value = forms, given[forms[0]]
    if name == "choice":
        # A text would be taken for the list of its characters.
        if isinstance(value, str):
            raise TypeError("choice must be a list of texts, not one text")
        return types.StructuredOutput(choice=types.Choices(texts=value))
    if name == "json_schema" and isinstance(value, Mapping):
        value = json.dumps(dict(value), ensure_ascii=False)
    form = types.StructuredOutput()
    setattr(form, name, value)
    return form


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
