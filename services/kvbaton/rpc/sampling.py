"""Sampling parameters, and the logprobs that they ask for, between protobuf and the engine's checked values."""

from collections.abc import Collection

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.output import TokenLogprobs
from kvbaton.engine.sampling import (
    MAX_LISTED_TOKEN_IDS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    FinishReason,
    SamplingParams,
    StructuredOutput,
    check_count,
)
from kvbaton.v1 import types_pb2 as types

FINISH_REASONS = {
    None: types.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: types.FINISH_REASON_STOP,
    FinishReason.LENGTH: types.FINISH_REASON_LENGTH,
}


def sampling_from_proto(proto: types.SamplingParams, max_tokens: int, seed: int) -> SamplingParams:
    """Check a request's parameters; `max_tokens` and `seed` stand in where the request has none. `n` is left out.

    Raises InvalidArgumentError that names the field.
    """
    if proto.HasField("top_k") and proto.top_k == 0:
        raise InvalidArgumentError("top_k", "0 is not 1 or more (leave it out to keep all tokens)")
    check_count("stop", len(proto.stop), MAX_STOP_STRINGS, "strings")
    check_count("logit_bias", len(proto.logit_bias), MAX_LISTED_TOKEN_IDS, "ids")
    return SamplingParams(
        max_tokens=proto.max_tokens if proto.HasField("max_tokens") else max_tokens,
        seed=proto.seed if proto.HasField("seed") else seed,
        temperature=proto.temperature,
        top_k=proto.top_k,
        top_p=proto.top_p if proto.HasField("top_p") else 1.0,
        min_p=proto.min_p,
        presence_penalty=proto.presence_penalty,
        frequency_penalty=proto.frequency_penalty,
        repetition_penalty=proto.repetition_penalty if proto.HasField("repetition_penalty") else 1.0,
        logit_bias=dict(proto.logit_bias),
        allowed_token_ids=_ids(proto.allowed_token_ids, "allowed_token_ids", MAX_LISTED_TOKEN_IDS),
        banned_token_ids=_ids(proto.banned_token_ids, "banned_token_ids", MAX_LISTED_TOKEN_IDS),
        min_tokens=proto.min_tokens,
        stop_token_ids=_ids(proto.stop_token_ids, "stop_token_ids", MAX_STOP_TOKEN_IDS),
        ignore_eos=proto.ignore_eos,
        stop=tuple(proto.stop),
        include_stop_in_output=proto.include_stop_in_output,
        logprobs=proto.logprobs if proto.HasField("logprobs") else None,
        prompt_logprobs=proto.prompt_logprobs if proto.HasField("prompt_logprobs") else None,
        structured_output=_form_from_proto(proto.structured_output) if proto.HasField("structured_output") else None,
    )


def complete_sampling_from_proto(proto: types.SamplingParams) -> SamplingParams:
    """The same for a request from a router, which has set everything, and made of n requests n.

    Raises InvalidArgumentError also when max_tokens or seed is missing, or n is there.
    """
    for field in ("max_tokens", "seed"):
        if not proto.HasField(field):
            raise InvalidArgumentError(field, "is missing")
    if proto.HasField("n"):
        raise InvalidArgumentError("n", "is for the router; a worker generates one sequence a request")
    return sampling_from_proto(proto, max_tokens=0, seed=0)


def sampling_to_proto(params: SamplingParams) -> types.SamplingParams:
    """Every value set, for a worker: `complete_sampling_from_proto` gives `params` again (floats as float32)."""
    proto = types.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias,
        allowed_token_ids=sorted(params.allowed_token_ids),
        banned_token_ids=sorted(params.banned_token_ids),
        min_tokens=params.min_tokens,
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop_token_ids=sorted(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        stop=params.stop,
        include_stop_in_output=params.include_stop_in_output,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )
    if params.top_k:
        proto.top_k = params.top_k
    if params.structured_output is not None:
        proto.structured_output.CopyFrom(_form_to_proto(params.structured_output))
    return proto


def logprobs_from_proto(proto: types.TokenLogprobs) -> TokenLogprobs:
    """Raises InvalidArgumentError when ids and logprobs of the most likely tokens are not pairs."""
    if len(proto.top_token_ids) != len(proto.top_logprobs):
        problem = f"{len(proto.top_logprobs)} values for {len(proto.top_token_ids)} ids"
        raise InvalidArgumentError("top_logprobs", problem)
    top = tuple(zip(proto.top_token_ids, proto.top_logprobs, strict=True))
    return TokenLogprobs(proto.token_id, proto.logprob, proto.rank, top)


def logprobs_to_proto(logprobs: TokenLogprobs) -> types.TokenLogprobs:
    """Inverse of `logprobs_from_proto` (floats as float32)."""
    return types.TokenLogprobs(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def _ids(ids: Collection[int], field: str, most: int) -> frozenset[int]:
    # Before it is a set: a message may carry millions of them.
    check_count(field, len(ids), most, "ids")
    return frozenset(ids)


def _form_from_proto(proto: types.StructuredOutput) -> StructuredOutput:
    match proto.WhichOneof("kind"):
        case "json_object":
            if not proto.json_object:
                raise InvalidArgumentError("structured_output.json_object", "false asks for nothing: leave it out")
            return StructuredOutput("json_object")
        case "choice":
            return StructuredOutput("choice", choices=tuple(proto.choice.texts))
        case "json_schema" | "regex" | "grammar" as kind:
            return StructuredOutput(kind, getattr(proto, kind))
        case _:
            kinds = "json_schema, json_object, regex, choice or grammar"
            raise InvalidArgumentError("structured_output", f"is empty: set {kinds}")


def _form_to_proto(form: StructuredOutput) -> types.StructuredOutput:
    if form.kind == "json_object":
        return types.StructuredOutput(json_object=True)
    if form.kind == "choice":
        return types.StructuredOutput(choice=types.Choices(texts=form.choices))
    return types.StructuredOutput(**{form.kind: form.text})  # type: ignore[arg-type]
