"""Sampling parameters between protobuf and the engine's checked values."""

from kvbaton.engine.errors import InvalidArgumentError
from kvbaton.engine.sampling import FinishReason, SamplingParams
from kvbaton.v1 import types_pb2 as types

FINISH_REASONS = {
    None: types.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: types.FINISH_REASON_STOP,
    FinishReason.LENGTH: types.FINISH_REASON_LENGTH,
}


def sampling_from_proto(proto: types.SamplingParams, max_tokens: int, seed: int) -> SamplingParams:
    """Check a request's parameters; `max_tokens` and `seed` stand in where the request has none.

    Raises InvalidArgumentError that names the field.
    """
    if proto.HasField("top_k") and proto.top_k == 0:
        raise InvalidArgumentError("top_k", "0 is not 1 or more (leave it out to keep all tokens)")
    return SamplingParams(
        max_tokens=proto.max_tokens if proto.HasField("max_tokens") else max_tokens,
        seed=proto.seed if proto.HasField("seed") else seed,
        temperature=proto.temperature,
        top_k=proto.top_k,
        top_p=proto.top_p if proto.HasField("top_p") else 1.0,
        stop_token_ids=frozenset(proto.stop_token_ids),
        ignore_eos=proto.ignore_eos,
    )


def complete_sampling_from_proto(proto: types.SamplingParams) -> SamplingParams:
    """The same for a request from a router, which has set everything.

    Raises InvalidArgumentError also when max_tokens or seed is missing.
    """
    for field in ("max_tokens", "seed"):
        if not proto.HasField(field):
            raise InvalidArgumentError(field, "is missing")
    return sampling_from_proto(proto, max_tokens=0, seed=0)


def sampling_to_proto(params: SamplingParams) -> types.SamplingParams:
    """Every value set, for a worker."""
    proto = types.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop_token_ids=sorted(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
    )
    if params.top_k:
        proto.top_k = params.top_k
    return proto
