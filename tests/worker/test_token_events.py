"""Tokens as messages: what belongs to the answer, and no more."""

from typing import Any

from kvbaton.engine.output import TokenLogprobs
from kvbaton.engine.result import TokenSampled
from kvbaton.engine.sampling import FinishReason, SamplingParams
from kvbaton.text.output import OutputText
from kvbaton.v1 import types_pb2 as types
from kvbaton.worker.token_events import prompt_logprobs_messages, token_event
from support.fakes import FakeTokenizer

TOKENIZER: Any = FakeTokenizer()


def sampled(first: int, *token_ids: int, finish: FinishReason | None = None) -> list[TokenSampled]:
    request: Any = None
    tokens = [TokenSampled(request, first + at, token_id, None) for at, token_id in enumerate(token_ids)]
    tokens[-1].finish_reason = finish
    return tokens


def text(**sampling: Any) -> OutputText:
    return OutputText(TOKENIZER, [5], [], SamplingParams(max_tokens=9, seed=0, **sampling))


def test_tokens_go_on_with_their_text() -> None:
    output = text()
    assert token_event(sampled(0, 7, 8), output) == types.TokenEvent(token_ids=[7, 8], text="<7><8>")
    last = token_event(sampled(2, 9, finish=FinishReason.LENGTH), output)
    assert last == types.TokenEvent(first_index=2, token_ids=[9], text="<9>", finish_reason=types.FINISH_REASON_LENGTH)


def test_what_comes_after_a_stop_string_is_left_out() -> None:
    tokens = sampled(4, 7, 8, 9, finish=FinishReason.LENGTH)
    for token in tokens:
        token.logprobs = TokenLogprobs(token.token_id, -0.5, 2, ((1, -0.25), (token.token_id, -0.5)))
    event = token_event(tokens, text(stop=("><8",)))
    assert event == types.TokenEvent(
        first_index=4,
        token_ids=[7, 8],
        text="<7",
        finish_reason=types.FINISH_REASON_STOP,
        stop="><8",
        logprobs=[
            types.TokenLogprobs(token_id=n, logprob=-0.5, rank=2, top_token_ids=[1, n], top_logprobs=[-0.25, -0.5])
            for n in (7, 8)
        ],
    )


def test_a_stop_string_that_the_last_token_completes_is_the_reason() -> None:
    event = token_event(sampled(0, 7, finish=FinishReason.LENGTH), text(stop=("7>",), include_stop_in_output=True))
    assert (event.text, event.stop, event.finish_reason) == ("<7>", "7>", types.FINISH_REASON_STOP)


def test_prompt_logprobs_go_in_messages_of_bounded_size() -> None:
    logprobs = [TokenLogprobs(n, -float(n), 1) for n in range(2500)]
    messages = list(prompt_logprobs_messages(logprobs))
    assert [len(message.tokens) for message in messages] == [1024, 1024, 452]
    assert [token.token_id for message in messages for token in message.tokens] == list(range(2500))
    assert list(prompt_logprobs_messages([])) == []
