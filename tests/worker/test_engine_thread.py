"""The engine's thread and the handles on the loop: tokens in order, every end of a request frees its blocks and tells
its handle, one failing request harms no other.
"""

import asyncio
import threading
from dataclasses import replace

import pytest

from kvbaton.engine.counters import Counts
from kvbaton.engine.errors import InvalidArgumentError, OverloadedError
from kvbaton.engine.request import Route
from kvbaton.engine.sampling import FinishReason
from kvbaton.engine.scheduler import Batch, Scheduler
from kvbaton.worker import engine_thread
from kvbaton.worker.engine_thread import EngineFailedError, EngineThread, RequestHandle, Snapshot
from support.fakes import FakeRunner, Gate
from support.threads import LIMITS, NUM_BLOCKS, PROMPT, collect, running, sampling, submit


async def test_tokens_come_in_order_and_end_with_a_reason() -> None:
    async with running(FakeRunner(), replace(LIMITS, max_waiting=3)) as thread:
        handles = [RequestHandle(name) for name in ("a", "b", "c")]
        for handle in handles:
            submit(thread, handle, PROMPT, sampling(), Route.LOCAL)
        for handle in handles:
            tokens = await collect(handle)
            assert [(t.index, t.token_id) for t in tokens] == [(0, 15), (1, 16), (2, 17), (3, 18)]
            assert [t.finish_reason for t in tokens] == [None, None, None, FinishReason.LENGTH]
            thread.remove(handle, finished=True)
        after = await thread.snapshot()
        assert (after.requests_finished, after.requests_cancelled) == (3, 0)
        assert (after.num_free_blocks, after.counts) == (NUM_BLOCKS, Counts())
        assert after.counters.prefill_tokens_computed == 3 * len(PROMPT)
        assert after.counters.decode_tokens_computed == 3 * 3


async def test_tokens_that_nobody_took_are_taken_together() -> None:
    async with running(FakeRunner()) as thread:
        handle = RequestHandle("a")
        submit(thread, handle, PROMPT, sampling(max_tokens=4), Route.LOCAL)
        await handle.admitted()
        while (await thread.snapshot()).counts != Counts():
            pass
        assert [t.index for t in await handle.next_tokens()] == [0, 1, 2, 3]


async def test_the_first_token_is_told_on_the_engines_thread_before_the_loop_hears_of_it() -> None:
    told: list[tuple[int, str]] = []

    def first_token(token_id: int) -> None:
        told.append((token_id, threading.current_thread().name))

    async with running(FakeRunner()) as thread:
        handle = RequestHandle("a", first_token)
        submit(thread, handle, PROMPT, sampling(), Route.HAND_OFF)
        tokens = await handle.next_tokens()
        assert [(t.index, t.token_id) for t in tokens] == [(0, 15)]
        assert told == [(15, "engine")]


async def test_received_kv_starts_the_decode() -> None:
    async with running(FakeRunner()) as thread:
        handle = RequestHandle("a")
        submit(thread, handle, PROMPT, sampling(), Route.RECEIVE)
        admitted = await handle.admitted()
        assert len(admitted.blocks) == 2
        thread.kv_received("a", 77)
        assert [t.token_id for t in await collect(handle)] == [77, 16, 17, 18]
        assert admitted.milestones.kv_ready is not None


async def phase(thread: EngineThread, name: str) -> Snapshot:
    """Wait until a request is in a phase."""
    while getattr((snapshot := await thread.snapshot()).counts, name) == 0:
        pass
    return snapshot


@pytest.mark.parametrize(("route", "name"), [(Route.RECEIVE, "receiving"), (Route.HAND_OFF, "handing_off")])
async def test_removal_frees_the_blocks_of_a_request_that_rests(route: Route, name: str) -> None:
    async with running(FakeRunner()) as thread:
        handle = RequestHandle("a")
        submit(thread, handle, PROMPT, sampling(), route)
        assert (await phase(thread, name)).num_free_blocks < NUM_BLOCKS
        for _ in range(2):
            thread.remove(handle, finished=False)
        after = await thread.snapshot()
        assert (after.num_free_blocks, after.counts) == (NUM_BLOCKS, Counts())
        assert (after.requests_finished, after.requests_cancelled) == (0, 1)


@pytest.mark.parametrize(("num_steps", "prefilled", "decoded"), [(1, 4, 0), (3, 5, 1)], ids=["prefilling", "decoding"])
async def test_removal_frees_the_blocks_after_the_step_that_runs(num_steps: int, prefilled: int, decoded: int) -> None:
    runner = FakeRunner()
    gate = runner.before_run = Gate(permits=num_steps - 1)
    async with running(runner) as thread:
        handle = RequestHandle("a")
        submit(thread, handle, PROMPT, sampling(), Route.LOCAL)
        for _ in range(num_steps):
            await gate.wait_reached()
        for _ in range(2):
            thread.remove(handle, finished=False)
        gate.open()
        after = await thread.snapshot()
        assert (after.num_free_blocks, after.counts) == (NUM_BLOCKS, Counts())
        assert (after.requests_finished, after.requests_cancelled) == (0, 1)
        counters = after.counters
        assert (counters.prefill_tokens_computed, counters.decode_tokens_computed) == (prefilled, decoded)


async def test_removal_of_a_waiting_request_lets_others_pass() -> None:
    async with running(FakeRunner()) as thread:
        large, waiting, small = (RequestHandle(name) for name in ("large", "waiting", "small"))
        submit(thread, large, [5] * 28, sampling(1), Route.RECEIVE)
        await large.admitted()
        submit(thread, waiting, [5] * 8, sampling(1), Route.RECEIVE)
        submit(thread, small, [5] * 2, sampling(1), Route.RECEIVE)
        assert (await thread.snapshot()).counts == Counts(waiting=2, receiving=1)
        thread.remove(waiting, finished=False)
        await small.admitted()
        assert waiting.request is None
        assert (await thread.snapshot()).counts == Counts(receiving=2)


async def test_a_request_that_waits_is_admitted_when_blocks_are_freed() -> None:
    async with running(FakeRunner()) as thread:
        first, second = RequestHandle("first"), RequestHandle("second")
        submit(thread, first, [5] * 32, sampling(1), Route.RECEIVE)
        submit(thread, second, [5] * 32, sampling(1), Route.RECEIVE)
        await first.admitted()
        assert (await thread.snapshot()).counts.waiting == 1
        thread.remove(first, finished=False)
        await second.admitted()


@pytest.mark.parametrize(
    ("prompt", "error", "problem"),
    [
        ([], InvalidArgumentError, "prompt: is empty"),
        ([5] * 64, InvalidArgumentError, "exceed the context of 64"),
        ([5] * 40, OverloadedError, "prompt and max_tokens: 43 tokens need 11 KV blocks, the whole pool has 8"),
    ],
)
async def test_a_request_that_cannot_be_added_hears_why(
    prompt: list[int], error: type[Exception], problem: str
) -> None:
    async with running(FakeRunner()) as thread:
        handle = RequestHandle("a")
        submit(thread, handle, prompt, sampling(), Route.RECEIVE)
        with pytest.raises(error, match=problem):
            await handle.admitted()
        with pytest.raises(error, match=problem):
            await handle.next_tokens()
        thread.remove(handle, finished=False)
        assert (await thread.snapshot()).requests_cancelled == 0


async def test_a_second_handle_with_the_same_id_harms_not_the_first() -> None:
    async with running(FakeRunner()) as thread:
        first, second = RequestHandle("a"), RequestHandle("a")
        submit(thread, first, PROMPT, sampling(), Route.RECEIVE)
        submit(thread, second, PROMPT, sampling(), Route.RECEIVE)
        with pytest.raises(InvalidArgumentError, match="request_id"):
            await second.admitted()
        thread.remove(second, finished=False)
        await first.admitted()
        assert (await thread.snapshot()).counts == Counts(receiving=1)


async def test_past_the_waiting_line_requests_are_refused() -> None:
    async with running(FakeRunner()) as thread:
        handles = [RequestHandle(str(number)) for number in range(4)]
        for handle in handles:
            submit(thread, handle, [5] * 32, sampling(1), Route.RECEIVE)
            await thread.snapshot()
        with pytest.raises(OverloadedError, match="2 requests are waiting already"):
            await handles[3].admitted()


async def test_a_failing_forward_pass_ends_its_own_requests_only() -> None:
    runner = FakeRunner()

    def fail(batch: Batch) -> None:
        if any(piece.request.request_id == "bad" for piece in batch.slices):
            raise RuntimeError("out of memory")

    runner.before_run = fail
    async with running(runner) as thread:
        waiting, bad = RequestHandle("waiting"), RequestHandle("bad")
        submit(thread, waiting, PROMPT, sampling(), Route.RECEIVE)
        submit(thread, bad, PROMPT, sampling(), Route.LOCAL)
        with pytest.raises(EngineFailedError, match="the forward pass failed"):
            await collect(bad)
        thread.remove(bad, finished=False)
        thread.kv_received("waiting", 50)
        assert [t.token_id for t in await collect(waiting)] == [50, 16, 17, 18]
        after = await thread.snapshot()
        assert (after.num_free_blocks, after.counts) == (NUM_BLOCKS, Counts())


async def test_tokens_before_a_failure_are_not_lost() -> None:
    runner = FakeRunner()

    def fail_to_decode(batch: Batch) -> None:
        if batch.num_decode_tokens:
            raise RuntimeError("broken")

    runner.before_run = fail_to_decode
    async with running(runner) as thread:
        handle = RequestHandle("a")
        submit(thread, handle, PROMPT, sampling(), Route.LOCAL)
        await handle.admitted()
        while (await thread.snapshot()).counts != Counts():
            pass
        assert [t.token_id for t in await handle.next_tokens()] == [15]
        with pytest.raises(EngineFailedError):
            await handle.next_tokens()


async def test_kv_for_a_request_that_has_gone_is_harmless() -> None:
    async with running(FakeRunner()) as thread:
        handle = RequestHandle("a")
        submit(thread, handle, PROMPT, sampling(), Route.RECEIVE)
        await handle.admitted()
        thread.remove(handle, finished=False)
        thread.kv_received("a", 5)
        thread.kv_received("never", 5)
        assert (await thread.snapshot()).counts == Counts()


async def test_a_cancelled_wait_leaves_the_handle_usable() -> None:
    async with running(FakeRunner()) as thread:
        handle = RequestHandle("a")
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(handle.admitted())
            await asyncio.sleep(0)
            waiting.cancel()
        assert waiting.cancelled()
        submit(thread, handle, PROMPT, sampling(1), Route.LOCAL)
        assert [t.token_id for t in await collect(handle)] == [15]


async def test_commands_beyond_the_bound_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_thread, "_MAX_COMMANDS", 2)
    runner = FakeRunner()
    gate = runner.before_run = Gate()
    async with running(runner) as thread:
        first = RequestHandle("first")
        submit(thread, first, PROMPT, sampling(1), Route.LOCAL)
        await gate.wait_reached()
        for number in range(2):
            submit(thread, RequestHandle(str(number)), PROMPT, sampling(1), Route.RECEIVE)
        with pytest.raises(OverloadedError, match="2 commands wait"):
            submit(thread, RequestHandle("one too many"), PROMPT, sampling(1), Route.RECEIVE)
        gate.open(2)
        assert [t.token_id for t in await collect(first)] == [15]


async def test_leaving_ends_the_thread_whatever_is_running() -> None:
    async with running(FakeRunner()) as thread:
        submit(thread, RequestHandle("a"), PROMPT, sampling(20), Route.LOCAL)
        submit(thread, RequestHandle("b"), PROMPT, sampling(), Route.RECEIVE)
    assert not any(alive.name == "engine" for alive in threading.enumerate())


async def test_who_asks_for_the_state_and_goes_harms_nobody() -> None:
    runner = FakeRunner()
    gate = runner.before_run = Gate()
    async with running(runner) as thread:
        handle = RequestHandle("a")
        submit(thread, handle, PROMPT, sampling(), Route.LOCAL)
        await gate.wait_reached()
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(thread.snapshot())
            await asyncio.sleep(0)
            asking.cancel()
        assert asking.cancelled()
        gate.open(10)
        assert [t.token_id for t in await collect(handle)] == [15, 16, 17, 18]


class Panic(BaseException):
    """What a library in another language throws when it is at its end."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
async def test_an_engine_that_fails_tells_everybody_and_takes_nothing_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    def broken(*_: object) -> None:
        raise kind("a bug outside of the forward pass")

    monkeypatch.setattr(Scheduler, "commit", broken)
    async with running(FakeRunner()) as thread:
        handle = RequestHandle("a")
        submit(thread, handle, PROMPT, sampling(), Route.LOCAL)
        with pytest.raises(EngineFailedError):
            await handle.next_tokens()
        with pytest.raises(EngineFailedError):
            await thread.snapshot()
        with pytest.raises(EngineFailedError):
            submit(thread, RequestHandle("b"), PROMPT, sampling(), Route.LOCAL)
        thread.remove(handle, finished=False)
        with pytest.raises(EngineFailedError):
            await thread.serve_until(asyncio.Event())
    assert "a bug outside of the forward pass" in caplog.text


async def test_an_engine_serves_until_it_is_stopped() -> None:
    async with running(FakeRunner()) as thread:
        stop = asyncio.Event()
        stop.set()
        await thread.serve_until(stop)
