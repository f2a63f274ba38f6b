"""Sampled tokens as the messages that carry them."""

from collections.abc import Iterator, Sequence

from kvbaton.engine.output import TokenLogprobs
from kvbaton.engine.result import TokenSampled
from kvbaton.rpc.sampling import FINISH_REASONS, logprobs_to_proto
from kvbaton.text.output import OutputText
from kvbaton.v1 import types_pb2 as types

_LOGPROBS_PER_MESSAGE = 1024
"""At 20 alternatives a token, some 200 KiB."""


def token_event(tokens: Sequence[TokenSampled], output: OutputText) -> types.TokenEvent:
    """One event for consecutive tokens, without those beyond a stop string; `output` grows by them.

    The event's finish_reason says whether the answer has ended.
    """
    reason = tokens[-1].finish_reason
    update = output.push([token.token_id for token in tokens], reason)
    used = tokens[: update.num_tokens]
    return types.TokenEvent(
        first_index=tokens[0].index,
        token_ids=[token.token_id for token in used],
        text=update.text,
        finish_reason=FINISH_REASONS[reason] if update.stop is None else types.FINISH_REASON_STOP,
        logprobs=[logprobs_to_proto(token.logprobs) for token in used if token.logprobs is not None],
        stop=update.stop or "",
    )


def prompt_logprobs_messages(logprobs: Sequence[TokenLogprobs]) -> Iterator[types.PromptLogprobs]:
    """Logprobs of a prompt's tokens, in messages of a bounded size; none for none."""
    for start in range(0, len(logprobs), _LOGPROBS_PER_MESSAGE):
        piece = logprobs[start : start + _LOGPROBS_PER_MESSAGE]
        yield types.PromptLogprobs(tokens=[logprobs_to_proto(token) for token in piece])
