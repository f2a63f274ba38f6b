"""What a decode worker streams of answers that are computed here, resumed, cached, handed back, or stopped by a string.

The fake model's token after n tokens is 10 + n; the prompt has five.
"""

import asyncio
from typing import Any

import grpc
import pytest

from kvbaton.engine.output import NOT_A_NUMBER, SampledToken, StepOutput, TokenLogprobs
from kvbaton.engine.scheduler import Batch
from kvbaton.v1 import decode_pb2 as pb
from kvbaton.v1 import types_pb2 as types
from support.decode_worker import FIRST, PROMPT, UNIFIED, admitted, refusal, rest, working
from support.fakes import BLOCK_SIZE, FakeRunner, FakeTokenizer, Gate


def joined(responses: list[pb.DecodeResponse], first_index: int) -> types.TokenEvent:
    """All token events as one; they must have no gaps."""
    whole = types.TokenEvent(first_index=first_index)
    for response in responses:
        if response.HasField("tokens"):
            assert response.tokens.first_index == first_index + len(whole.token_ids)
            whole.token_ids.extend(response.tokens.token_ids)
            whole.text += response.tokens.text
            whole.finish_reason = response.tokens.finish_reason
            whole.stop = response.tokens.stop
    return whole


async def test_a_prompt_computed_here_is_answered_from_the_first_token() -> None:
    async with working(limits=UNIFIED) as worker:
        call = worker.locally()
        assert (await admitted(call)).ticket == b""
        assert len(worker.book) == 0
        responses = await rest(call)
        tokens = joined(responses, first_index=0)
        assert list(tokens.token_ids) == [15, 16, 17, 18]
        assert tokens.finish_reason == types.FINISH_REASON_LENGTH
        finished = responses[-1].finished
        assert finished.prefill_compute_seconds > 0
        assert finished.decode_seconds > 0
        await worker.assert_free()
        assert (await worker.runtime.engine.snapshot()).counters.prefill_tokens_computed == len(PROMPT)


async def test_an_answer_computed_here_goes_on_after_the_tokens_it_has() -> None:
    async with working(limits=UNIFIED) as worker:
        call = worker.locally(output=[70, 71])
        await admitted(call)
        tokens = joined(await rest(call), first_index=2)
        assert list(tokens.token_ids) == [17, 18], "two of max_tokens 4 were there"


async def test_an_answer_resumed_with_kv_goes_on_after_the_token_that_came_with_it() -> None:
    async with working() as worker:
        call = worker.decode(output=[70])
        await worker.send_kv((await admitted(call)).ticket, range(6))
        tokens = joined(await rest(call), first_index=2)
        assert list(tokens.token_ids) == [17, 18]


async def test_kv_that_is_here_need_not_come_again() -> None:
    prompt = [5] * 9
    async with working() as worker:
        for num_cached in (0, 2 * BLOCK_SIZE):
            call = worker.decode(prompt)
            answer = await admitted(call)
            assert answer.num_cached_tokens == num_cached
            await worker.send_kv(answer.ticket, range(num_cached, 9))
            responses = await rest(call)
            assert list(joined(responses, first_index=1).token_ids) == [20, 21, 22]
            assert responses[-1].finished.cached_tokens == num_cached
        await worker.assert_free()


async def test_when_blocks_run_out_the_last_request_is_handed_back_with_its_tokens() -> None:
    runner = FakeRunner()
    gate = runner.before_run = Gate()
    async with working(runner, limits=UNIFIED) as worker:
        before = worker.locally(max_tokens=1)
        # It is told before the step is computed, which the gate holds up until both others are in the line.
        await admitted(before)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(rest(worker.locally(prompt, max_tokens=20))) for prompt in ([6] * 8, [7] * 8)]
            while worker.runtime.engine._commands.qsize() < len(tasks):
                await asyncio.sleep(0)
            gate.open(100)
        first, second = sorted((task.result() for task in tasks), key=lambda answer: answer[-1].HasField("preempted"))
        assert len(joined(first, first_index=0).token_ids) == 20
        assert first[-1].HasField("finished")
        assert "ran out of KV blocks" in second[-1].preempted.reason
        assert 0 < len(joined(second, first_index=0).token_ids) < 20
        assert not any(response.HasField("finished") for response in second)
        await worker.assert_free()
        snapshot = await worker.runtime.engine.snapshot()
        assert (snapshot.counters.requests_preempted, snapshot.requests_cancelled) == (1, 0)


async def test_a_stop_string_ends_the_answer_and_the_engines_request() -> None:
    async with working(limits=UNIFIED, tokenizer=FakeTokenizer()) as worker:
        call = worker.locally(max_tokens=20, stop=["6><17"])
        await admitted(call)
        responses = await rest(call)
        tokens = joined(responses, first_index=0)
        assert (list(tokens.token_ids), tokens.text, tokens.stop) == ([15, 16, 17], "<15><1", "6><17")
        assert tokens.finish_reason == types.FINISH_REASON_STOP
        assert responses[-1].finished.decode_seconds > 0
        await worker.assert_free()
        assert (await worker.runtime.engine.snapshot()).requests_finished == 1


async def test_a_stop_string_may_begin_before_the_resume() -> None:
    async with working(limits=UNIFIED, tokenizer=FakeTokenizer()) as worker:
        call = worker.locally(output=[70], max_tokens=20, stop=["0><16"])
        await admitted(call)
        tokens = joined(await rest(call), first_index=1)
        assert (list(tokens.token_ids), tokens.text, tokens.stop) == ([16], "", "0><16")


async def test_a_stop_string_in_the_first_token_leaves_nothing_to_stream() -> None:
    async with working(tokenizer=FakeTokenizer()) as worker:
        call = worker.decode(stop=[f"<{FIRST}>"])
        await worker.send_kv((await admitted(call)).ticket)
        [response] = await rest(call)
        assert response.HasField("finished")
        await worker.assert_free()


class FaultyRunner(FakeRunner):
    """Its logits for prompts that begin with 9 are not numbers."""

    def run(self, batch: Batch) -> StepOutput:
        faulty = [piece.request.prompt[0] == 9 for piece in batch.slices if piece.samples]
        tokens = zip(super().run(batch).sampled, faulty, strict=True)
        return StepOutput([SampledToken(NOT_A_NUMBER) if bad else token for token, bad in tokens])


async def test_logits_that_are_not_numbers_end_one_request_alone() -> None:
    async with working(FaultyRunner(), limits=UNIFIED) as worker:
        good, bad = worker.locally([5] * 5, max_tokens=12), worker.locally([9] * 5, max_tokens=12)
        await admitted(good)
        await admitted(bad)
        good_answer, error = await asyncio.gather(rest(good), refusal(bad))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert len(joined(good_answer, first_index=0).token_ids) == 12
        await worker.assert_free()
        assert (await worker.runtime.engine.snapshot()).counters.requests_not_a_number == 1


class TellingRunner(FakeRunner):
    """Reports a logprob for each token of a prompt but the first, and for each that it samples."""

    def run(self, batch: Batch) -> StepOutput:
        sampled = [SampledToken(t.token_id, TokenLogprobs(t.token_id, -1.0, 1)) for t in super().run(batch).sampled]
        prompts = {}
        for piece in batch.slices:
            if piece.is_prefill:
                following = piece.request.prompt[piece.start + 1 : piece.start + piece.num_tokens + 1]
                prompts[piece.request.request_id] = [TokenLogprobs(token, -2.0, 3) for token in following]
        return StepOutput(sampled, prompts)


async def test_logprobs_come_with_their_tokens_and_the_prompts_before_the_first() -> None:
    async with working(TellingRunner(), limits=UNIFIED) as worker:
        call = worker.locally(logprobs=0, prompt_logprobs=0)
        await admitted(call)
        first, *others, _ = await rest(call)
        assert [token.token_id for token in first.prompt_logprobs.tokens] == PROMPT[1:]
        told = [logprobs.token_id for response in others for logprobs in response.tokens.logprobs]
        assert told == [15, 16, 17, 18]


@pytest.mark.parametrize(
    ("request_", "sampling", "field"),
    [
        ({"output_token_ids": b"abc"}, {}, "output_token_ids: 3 bytes"),
        ({"output_token_ids": bytes([100, 0, 0, 0])}, {}, "output_token_ids: token id 100 is not below 100"),
        ({"output_token_ids": bytes(16)}, {}, "output_token_ids: 4 tokens leave nothing of max_tokens 4"),
        ({"cache_salt": "x" * 129}, {}, "cache_salt: 129 characters"),
        ({}, {"stop_token_ids": [100]}, "stop_token_ids: 100 is not below 100"),
        ({}, {"stop": ["x"]}, "stop: the model has no tokenizer"),
        ({}, {"stop": [""]}, "stop[0]: is empty"),
        ({}, {"stop": ["x"] * 10_000}, "stop: 10000 strings are more than 16"),
        (
            {},
            {"structured_output": types.StructuredOutput(regex="a"), "ignore_eos": False},
            "structured_output: the model has no tokenizer",
        ),
        ({}, {"n": 2}, "n: is for the router"),
    ],
)
async def test_a_malformed_request_is_refused_by_the_field(
    request_: dict[str, Any], sampling: dict[str, Any], field: str
) -> None:
    async with working() as worker:
        values = {"prompt_token_ids": bytes(4), **request_}
        error = await refusal(worker.call(pb.DecodeRequest(**values), **sampling))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in (error.details() or "")
        await worker.assert_free()
