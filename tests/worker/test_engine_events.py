"""What a handle hears of besides its tokens: hand-backs, failures, logprobs; and what a snapshot tells of it all."""

from dataclasses import replace

import pytest

from kvbaton.engine.errors import NotANumberError, PreemptedError
from kvbaton.engine.output import NOT_A_NUMBER, SampledToken, StepOutput, TokenLogprobs
from kvbaton.engine.request import Route
from kvbaton.engine.scheduler import Batch
from kvbaton.worker.engine_thread import RequestHandle
from support.fakes import FakeRunner
from support.threads import LIMITS, NUM_BLOCKS, PROMPT, collect, running, sampling, submit


async def test_a_request_that_is_handed_back_hears_so_after_its_tokens_and_frees_its_blocks() -> None:
    async with running(FakeRunner(), replace(LIMITS, max_prefill_tokens=8)) as thread:
        first, second = RequestHandle("first"), RequestHandle("second")
        submit(thread, first, PROMPT, sampling(max_tokens=24), Route.LOCAL)
        submit(thread, second, [50, *PROMPT], sampling(max_tokens=24), Route.LOCAL)
        assert [t.index for t in await collect(first)] == list(range(24))
        while (await thread.snapshot()).counts.decoding:
            pass
        tokens = await second.next_tokens()
        with pytest.raises(PreemptedError, match="ran out of KV blocks"):
            await second.next_tokens()
        assert 0 < len(tokens) < 24
        # The same id may come back before the handler of the old one has cleaned up.
        resumed = RequestHandle("second")
        more = {"output": [token.token_id for token in tokens]}
        submit(thread, resumed, [50, *PROMPT], sampling(max_tokens=24), Route.LOCAL, **more)
        thread.remove(second, finished=False)
        tokens += await collect(resumed)
        assert [(t.index, t.token_id) for t in tokens] == [(index, 16 + index) for index in range(24)]
        after = await thread.snapshot()
        assert (after.counters.requests_preempted, after.requests_cancelled) == (1, 0)
        assert after.num_free_blocks == NUM_BLOCKS


class LogprobsRunner(FakeRunner):
    """Tells of each token of a prompt where it is asked to, and makes no sense of a prompt that begins with 13."""

    def run(self, batch: Batch) -> StepOutput:
        output = super().run(batch)
        told = {
            piece.request.request_id: [TokenLogprobs(token, -0.5, 1) for token in piece.token_ids()]
            for piece in batch.slices
            if piece.is_prefill and piece.request.sampling.prompt_logprobs is not None
        }
        samplers = [piece.request for piece in batch.slices if piece.samples]
        sampled = [
            SampledToken(NOT_A_NUMBER) if request.prompt[0] == 13 else token
            for request, token in zip(samplers, output.sampled, strict=True)
        ]
        return StepOutput(sampled, told)


async def test_logprobs_of_the_prompt_are_there_before_the_first_token() -> None:
    async with running(LogprobsRunner()) as thread:
        handle = RequestHandle("a")
        submit(thread, handle, PROMPT, replace(sampling(1), prompt_logprobs=0), Route.LOCAL)
        await handle.next_tokens()
        assert [logprobs.token_id for logprobs in handle.prompt_logprobs] == PROMPT


async def test_logits_that_are_not_numbers_are_one_requests_trouble_and_counted() -> None:
    async with running(LogprobsRunner()) as thread:
        good, bad = RequestHandle("good"), RequestHandle("bad")
        submit(thread, good, PROMPT, sampling(), Route.LOCAL)
        submit(thread, bad, [13], sampling(), Route.LOCAL)
        with pytest.raises(NotANumberError):
            await bad.next_tokens()
        assert len(await collect(good)) == 4
        assert (await thread.snapshot()).counters.requests_not_a_number == 1


async def test_the_first_token_of_a_resumed_request_is_told_with_its_own_index() -> None:
    told: list[int] = []
    async with running(FakeRunner()) as thread:
        handle = RequestHandle("a", told.append)
        submit(thread, handle, PROMPT, sampling(), Route.HAND_OFF, output=[40, 41])
        assert [token.index for token in await handle.next_tokens()] == [2]
        assert told == [10 + len(PROMPT) + 2]


async def test_a_worker_that_decodes_no_more_hands_back_and_refuses_until_it_does_again() -> None:
    async with running(FakeRunner()) as thread:
        received, refused, served = RequestHandle("a"), RequestHandle("b"), RequestHandle("c")
        submit(thread, received, PROMPT, sampling(), Route.RECEIVE)
        await received.admitted()
        thread.set_limits(replace(LIMITS, max_decode_seqs=0))
        thread.kv_received("a", 77)
        assert [token.token_id for token in await received.next_tokens()] == [77]
        with pytest.raises(PreemptedError, match="does not decode any more"):
            await received.next_tokens()
        submit(thread, refused, PROMPT, sampling(), Route.LOCAL)
        with pytest.raises(PreemptedError, match="does not decode at present"):
            await refused.admitted()
        thread.set_limits(LIMITS)
        submit(thread, served, PROMPT, sampling(), Route.LOCAL)
        assert len(await collect(served)) == 4
        assert (await thread.snapshot(check=True)).limits == LIMITS


async def test_a_snapshot_tells_what_the_prefix_cache_has_and_gave() -> None:
    async with running(FakeRunner()) as thread:
        for name in ("a", "b"):
            handle = RequestHandle(name)
            submit(thread, handle, PROMPT, sampling(), Route.LOCAL)
            await collect(handle)
        after = await thread.snapshot(check=True)
        assert (after.num_free_blocks, after.num_cached_blocks) == (NUM_BLOCKS, 2)
        assert (after.counters.prefix_tokens_queried, after.counters.prefix_tokens_hit) == (10, 4)
