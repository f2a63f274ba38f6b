"""From a client's request to one that workers can be asked: everything is checked here, before any of them is."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.sampling import MAX_SEED, SamplingParams, check_token_ids_in_vocabulary
from kvbaton.engine.tokens import check_token_ids, unpack_token_ids
from kvbaton.rpc.sampling import sampling_from_proto
from kvbaton.text.tokenizer import Tokenizer
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types

MAX_REQUEST_ID = 128
MAX_CACHE_SALT = 128
MAX_N = 128
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request in the workers' terms."""

    request_id: str
    prompt: Sequence[int]
    sampling: SamplingParams
    """Of the first answer."""
    n: int = 1
    priority: int = 0
    cache_salt: str = ""


def admit(
    request: pb.GenerateRequest,
    prompt: Sequence[int],
    model: types.ModelInfo,
    tokenizer: Tokenizer | None,
    default_max_tokens: int,
) -> AdmittedRequest:
    """Check everything but the prompt's form, which `prompt_token_ids` did, and fill in defaults.

    Raises InvalidArgumentError that names the field.
    """
    _check_printable("request_id", request.request_id, MAX_REQUEST_ID)
    _check_printable("cache_salt", request.cache_salt, MAX_CACHE_SALT)
    check_prompt(prompt, model)
    left = model.max_model_len - len(prompt)
    if left < 1:
        problem = f"{len(prompt)} tokens leave no room in the model's context of {model.max_model_len}"
        raise InvalidArgumentError("prompt", problem)
    if request.sampling.max_tokens > left:
        problem = f"{request.sampling.max_tokens} and {len(prompt)} prompt tokens exceed {model.max_model_len}"
        raise InvalidArgumentError("max_tokens", f"{problem}, the model's context")
    _check_request(request.sampling, tokenizer)
    sampling = sampling_from_proto(
        request.sampling, max_tokens=min(left, default_max_tokens), seed=secrets.randbelow(MAX_SEED + 1)
    )
    check_token_ids_in_vocabulary(sampling, model.vocab_size, frozenset(model.eos_token_ids))
    return AdmittedRequest(
        request_id=request.request_id or f"req-{secrets.token_hex(8)}",
        prompt=prompt,
        sampling=sampling,
        n=request.sampling.n or 1,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def check_model(name: str, model: types.ModelInfo) -> None:
    """Raises InvalidArgumentError unless `name` is the served model's, or empty."""
    if name and name != model.name:
        raise InvalidArgumentError("model", f"{name!r} is not served here; {model.name!r} is")


def check_prompt(prompt: Sequence[int], model: types.ModelInfo) -> None:
    """Raises InvalidArgumentError for an empty prompt or a token that the model does not have."""
    if not prompt:
        raise InvalidArgumentError("prompt", "is empty")
    check_token_ids(prompt, model.vocab_size, "prompt.tokens")


def check_prompt_size(prompt: pb.Prompt, tokenizer: Tokenizer | None, max_model_len: int) -> None:
    """Refuse, before it costs anything, a prompt that cannot fit the context whatever its tokens are.

    Tokenizing megabytes takes seconds, and other requests wait behind it. Raises InvalidArgumentError.
    """
    kind, num_messages = prompt.WhichOneof("kind"), len(prompt.chat.messages)
    if num_messages > max_model_len:
        problem = f"{num_messages} messages exceed the model's context of {max_model_len} tokens"
        raise InvalidArgumentError("prompt.chat.messages", problem)
    if kind == "tokens":
        size, most, unit = len(prompt.tokens.token_ids) // 4, max_model_len, "tokens"
    elif tokenizer is not None and kind is not None:
        contents = [message.content for message in prompt.chat.messages] if kind == "chat" else [prompt.text]
        size, most, unit = sum(map(len, contents)), tokenizer.max_chars(max_model_len), "characters"
    else:
        return
    if size > most:
        raise InvalidArgumentError("prompt", f"{size} {unit} exceed the model's context of {max_model_len} tokens")


def prompt_token_ids(prompt: pb.Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """Tokens of any kind of prompt. Raises InvalidArgumentError that names what is wrong."""
    match prompt.WhichOneof("kind"):
        case "tokens":
            return unpack_token_ids(prompt.tokens.token_ids, "prompt.tokens")
        case "text":
            if not prompt.text:
                raise InvalidArgumentError("prompt.text", "is empty")
            return _need(tokenizer, "prompt.text").encode(prompt.text)
        case "chat":
            _check_messages(prompt.chat)
            messages = [{"role": m.role, "content": m.content} for m in prompt.chat.messages]
            return _need(tokenizer, "prompt.chat").encode_chat(messages)
        case _:
            raise InvalidArgumentError("prompt", "is missing: set text, tokens or chat")


def _check_messages(chat: pb.ChatPrompt) -> None:
    if not chat.messages:
        raise InvalidArgumentError("prompt.chat.messages", "is empty")
    for index, message in enumerate(chat.messages):
        if message.role not in _ROLES:
            problem = f"{message.role!r} is not one of {', '.join(_ROLES)}"
            raise InvalidArgumentError(f"prompt.chat.messages[{index}].role", problem)


def _need(tokenizer: Tokenizer | None, field: str) -> Tokenizer:
    if tokenizer is None:
        raise InvalidArgumentError(field, "the model has no tokenizer; send token ids")
    return tokenizer


def _check_request(sampling: types.SamplingParams, tokenizer: Tokenizer | None) -> None:
    """What `SamplingParams` cannot check, since it has no n and knows no tokenizer."""
    if sampling.HasField("n") and not 1 <= sampling.n <= MAX_N:
        raise InvalidArgumentError("n", f"{sampling.n} is not between 1 and {MAX_N}")
    for field, asked in (
        ("stop", len(sampling.stop) > 0),
        ("structured_output", sampling.HasField("structured_output")),
    ):
        if asked and tokenizer is None:
            raise InvalidArgumentError(field, "the model has no tokenizer, and so no text")


def _check_printable(field: str, text: str, most: int) -> None:
    if len(text) > most or not text.isprintable():
        raise InvalidArgumentError(field, f"must be at most {most} printable characters")
