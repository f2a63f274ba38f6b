"""Events in: what the SDK makes of what comes back. No calls."""

from typing import Any

import pytest

from kvbaton.client._answers import Assembly, Chunk, TokenLogprobs, Usage
from kvbaton.client._errors import ServiceError
from kvbaton.v1 import inference_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.fakes import token_event


def event(*args: Any, **kwargs: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(tokens=token_event(*args, **kwargs))


def finished(**fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.GenerateFinished(**fields))


def test_events_are_assembled_to_an_answer() -> None:
    assembly = Assembly()
    assert assembly.add(event(0, 10, text="He")) == Chunk(0, (10,), "He")
    assert assembly.add(event(1, 11, 12, text="llo")) == Chunk(1, (11, 12), "llo")
    assert assembly.add(event(3, 13)) == Chunk(3, (13,), "")
    last = finished(
        request_id="r",
        model="m",
        finish_reason=types.FINISH_REASON_STOP,
        usage=types.Usage(prompt_tokens=1, completion_tokens=4, cached_tokens=2),
        timings=types.Timings(total_seconds=3),
        seed=9,
        prefill_worker="p:1",
        decode_worker="d:1",
    )
    assert assembly.add(last) is None
    result = assembly.result()
    assert (result.text, result.token_ids, result.finish_reason) == ("Hello", (10, 11, 12, 13), "stop")
    assert result.usage == Usage(1, 4, 2)
    assert result.timings.total_seconds == 3
    assert (result.request_id, result.model, result.seed) == ("r", "m", 9)
    assert (result.prefill_worker, result.decode_worker) == ("p:1", "d:1")


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        (types.FINISH_REASON_STOP, "stop"),
        (types.FINISH_REASON_LENGTH, "length"),
        (types.FINISH_REASON_UNSPECIFIED, "unknown"),
    ],
)
def test_finish_reasons_have_names(reason: Any, name: str) -> None:
    assembly = Assembly()
    assembly.add(finished(finish_reason=reason))
    assert assembly.result().finish_reason == name


@pytest.mark.parametrize("index", [0, 2])
def test_a_gap_or_a_repeat_is_an_error(index: int) -> None:
    assembly = Assembly()
    assembly.add(event(0, 10))
    with pytest.raises(ServiceError, match=f"token {index} came where 1 was next"):
        assembly.add(event(index, 11))


def test_an_answer_without_its_end_is_an_error() -> None:
    assembly = Assembly()
    assembly.add(event(0, 10))
    with pytest.raises(ServiceError, match="ended without a result"):
        assembly.result()


def tokens(**fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(tokens=types.TokenEvent(**fields))


STOP, LENGTH = types.FINISH_REASON_STOP, types.FINISH_REASON_LENGTH


def test_sequences_are_kept_apart() -> None:
    assembly = Assembly(2)
    assembly.add(tokens(first_index=0, token_ids=[5], text="a"))
    chunk = assembly.add(tokens(first_index=0, token_ids=[6, 7], text="b", sequence=1))
    assert chunk == Chunk(0, (6, 7), "b", sequence=1)
    last = assembly.add(tokens(first_index=1, token_ids=[8], text="c", finish_reason=STOP, stop="END"))
    assert last == Chunk(1, (8,), "c", finish_reason="stop", stop="END")
    assembly.add(tokens(first_index=2, token_ids=[9], sequence=1, finish_reason=LENGTH))
    assembly.add(finished(finish_reason=STOP, num_resumes=3))
    result = assembly.result()
    assert [one.text for one in result.sequences] == ["ac", "b"]
    assert [one.token_ids for one in result.sequences] == [(5, 8), (6, 7, 9)]
    assert [one.finish_reason for one in result.sequences] == ["stop", "length"]
    assert [one.stop for one in result.sequences] == ["END", None]
    first = result.sequences[0]
    assert (result.text, result.token_ids, result.finish_reason) == (first.text, first.token_ids, first.finish_reason)
    assert (result.stop, result.logprobs, result.num_resumes) == ("END", (), 3)


def test_a_gap_in_another_sequence_is_an_error() -> None:
    assembly = Assembly(2)
    assembly.add(tokens(first_index=0, token_ids=[5]))
    with pytest.raises(ServiceError, match="token 1 came where 0 was next"):
        assembly.add(tokens(first_index=1, token_ids=[5], sequence=1))


@pytest.mark.parametrize("sequence", [1, 2**32 - 1])
def test_a_sequence_that_was_not_asked_for_is_an_error(sequence: int) -> None:
    with pytest.raises(ServiceError, match=f"sequence {sequence} came where n is 1"):
        Assembly().add(tokens(first_index=0, token_ids=[5], sequence=sequence))


def test_tokens_after_the_end_are_an_error() -> None:
    assembly = Assembly()
    assembly.add(tokens(first_index=0, token_ids=[5], finish_reason=STOP))
    with pytest.raises(ServiceError, match="token 1 came after the end of sequence 0"):
        assembly.add(tokens(first_index=1, token_ids=[5]))


@pytest.mark.parametrize("begun", [False, True])
def test_a_sequence_without_its_end_is_an_error(begun: bool) -> None:
    assembly = Assembly(2)
    assembly.add(tokens(first_index=0, token_ids=[5], finish_reason=STOP))
    if begun:
        assembly.add(tokens(first_index=0, token_ids=[5], sequence=1))
    assembly.add(finished(finish_reason=STOP))
    with pytest.raises(ServiceError, match="ended before sequence 1 did"):
        assembly.result()


def likely(token_id: int) -> types.TokenLogprobs:
    return types.TokenLogprobs(
        token_id=token_id, logprob=-0.5, rank=2, top_token_ids=[9, token_id], top_logprobs=[-0.25, -0.5]
    )


def test_logprobs_come_with_their_tokens_and_those_of_the_prompt_before() -> None:
    assembly = Assembly()
    for token_id in (3, 4):
        assert assembly.add(pb.GenerateResponse(prompt_logprobs={"tokens": [likely(token_id)]})) is None
    chunk = assembly.add(tokens(first_index=0, token_ids=[5, 6], logprobs=[likely(5), likely(6)]))
    expected = tuple(TokenLogprobs(token, -0.5, 2, ((9, -0.25), (token, -0.5))) for token in (5, 6))
    assert chunk is not None
    assert chunk.logprobs == expected
    assembly.add(finished())
    result = assembly.result()
    assert result.logprobs == expected
    assert [one.token_id for one in result.prompt_logprobs] == [3, 4]


def test_logprobs_of_other_tokens_are_an_error() -> None:
    with pytest.raises(ServiceError, match="1 logprobs came with 2 tokens"):
        Assembly().add(tokens(first_index=0, token_ids=[5, 6], logprobs=[likely(5)]))
