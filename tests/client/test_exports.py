"""The SDK's public names: whoever adds or removes one changes this list, and knows it."""

import inspect

import kvbaton.client

EXPORTS = {
    "AsyncClient": ["close", "generate", "models", "tokenize"],
    "AsyncGeneration": ["aclose", "result"],
    "Chunk": ["finish_reason", "index", "logprobs", "sequence", "stop", "text", "token_ids"],
    "Client": ["close", "generate", "models", "tokenize"],
    "DeadlineExceededError": [],
    "GenerateOptions": None,
    "GeneratedSequence": ["finish_reason", "logprobs", "stop", "text", "token_ids"],
    "Generation": ["close", "result"],
    "GenerationResult": [
        "decode_worker",
        "finish_reason",
        "logprobs",
        "model",
        "num_resumes",
        "prefill_worker",
        "prompt_logprobs",
        "request_id",
        "seed",
        "sequences",
        "stop",
        "text",
        "timings",
        "token_ids",
        "usage",
    ],
    "InvalidArgumentError": [],
    "KvbatonError": [],
    "OverloadedError": [],
    "PromptLike": None,
    "RequestCancelledError": [],
    "ServiceError": [],
    "TokenLogprobs": ["logprob", "rank", "token_id", "top"],
    "UnavailableError": [],
    "Usage": ["cached_tokens", "completion_tokens", "prompt_tokens"],
}


def test_the_public_names_are_these() -> None:
    assert sorted(kvbaton.client.__all__) == sorted(EXPORTS)


def test_the_public_members_are_these() -> None:
    for name, members in EXPORTS.items():
        if members is None:
            continue
        exported = getattr(kvbaton.client, name)
        public = [member for member in vars(exported) if not member.startswith("_")]
        assert sorted(public) == members, name
        assert inspect.getdoc(exported), name


def test_every_error_is_a_kvbaton_error() -> None:
    errors = [getattr(kvbaton.client, name) for name in EXPORTS if name.endswith("Error")]
    assert all(issubclass(error, kvbaton.client.KvbatonError) for error in errors)


def test_both_clients_have_the_same_calls() -> None:
    asynchronous, synchronous = kvbaton.client.AsyncClient, kvbaton.client.Client
    for name in ("generate", "tokenize", "models"):
        ours = inspect.signature(getattr(asynchronous, name)).parameters
        theirs = inspect.signature(getattr(synchronous, name)).parameters
        assert list(ours) == list(theirs)
