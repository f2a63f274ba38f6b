"""A router that goes away, at any step of a request on unified workers, leaves no block held within a second."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kvbaton.rpc.serving import channel
from kvbaton.v1 import decode_pb2
from kvbaton.v1.decode_pb2_grpc import DecodeServiceStub
from support.cluster import assert_idle, wait_for_status
from support.legs import Ask, answer_locally, hand_over

from .conftest import Unified

LONG = 20_000
"""Tokens that take far longer than any test looks at them."""
LONG_ANSWER = Ask(prompt=[5, 6, 7], sampling={"max_tokens": LONG})
LONG_PROMPT = Ask(prompt=[5] * LONG)


@pytest.fixture
async def worker(unified: Unified) -> AsyncIterator[str]:
    # Room for one long prompt and a little more, in small chunks, so that it takes long.
    async with unified(max_prefill_tokens=32, kv_memory="10MiB") as address:
        yield address


async def cancelled(work: "asyncio.Task[Any]") -> None:
    work.cancel()
    await asyncio.wait([work])


async def test_while_it_waits_for_blocks(worker: str) -> None:
    async with asyncio.TaskGroup() as group:
        first = group.create_task(answer_locally(worker, LONG_PROMPT))
        await wait_for_status(worker, lambda s: s.queues.num_prefilling == 1)
        second = group.create_task(answer_locally(worker, Ask(prompt=[6] * LONG)))
        await wait_for_status(worker, lambda s: s.queues.num_waiting == 1)
        await cancelled(second)
        status = await wait_for_status(worker, lambda s: s.queues.num_waiting == 0)
        assert status.queues.num_prefilling == 1, "the other request goes on"
        await cancelled(first)
    await assert_idle(worker)


async def test_while_its_prompt_is_computed(worker: str) -> None:
    async with asyncio.TaskGroup() as group:
        work = group.create_task(answer_locally(worker, LONG_PROMPT))
        await wait_for_status(worker, lambda s: s.counters.prefill_tokens_computed > 0)
        await cancelled(work)
    await assert_idle(worker)
    status = await wait_for_status(worker, lambda s: s.counters.requests_cancelled == 1)
    assert status.counters.prefill_tokens_computed < LONG, "the rest of the prompt is not computed"


async def test_while_tokens_stream_beside_a_prompt(worker: str) -> None:
    async with asyncio.TaskGroup() as group:
        streaming = group.create_task(answer_locally(worker, LONG_ANSWER))
        await wait_for_status(worker, lambda s: s.counters.decode_tokens_computed > 5)
        computing = group.create_task(answer_locally(worker, Ask(prompt=[5] * 2000)))
        await wait_for_status(worker, lambda s: s.queues.num_prefilling == 1)
        await cancelled(streaming)
        await wait_for_status(worker, lambda s: s.queues.num_decoding == 0)
        await cancelled(computing)
    await assert_idle(worker)


async def test_while_its_kv_moves_from_one_to_another(worker: str, unified: Unified) -> None:
    async with unified(kv_memory="10MiB") as other:
        async with asyncio.TaskGroup() as group:
            work = group.create_task(hand_over(worker, other, LONG_PROMPT))
            await wait_for_status(other, lambda s: s.counters.kv_bytes_received > 0)
            await cancelled(work)
        await assert_idle(worker, other)


async def test_by_deadline(worker: str) -> None:
    async with channel(worker) as opened:
        request = decode_pb2.DecodeRequest(prefill_locally=True, **LONG_ANSWER.fields())
        call = DecodeServiceStub(opened).Decode(request, timeout=0.5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await assert_idle(worker)


async def test_at_any_moment(worker: str) -> None:
    rng = random.Random(4)
    async with channel(worker) as opened:
        stub = DecodeServiceStub(opened)

        async def ask_and_leave(delay: float, length: int) -> None:
            ask = Ask(prompt=[5 + length % 50] * length, sampling={"max_tokens": 64})
            call = stub.Decode(decode_pb2.DecodeRequest(prefill_locally=True, **ask.fields()))
            await call.read()
            await asyncio.sleep(delay)
            call.cancel()

        async with asyncio.TaskGroup() as group:
            for _ in range(100):
                group.create_task(ask_and_leave(rng.uniform(0, 0.3), rng.randint(1, 200)))
    await assert_idle(worker)
    answer = await answer_locally(worker, Ask(prompt=[5, 6, 7]))
    assert len(answer.token_ids) == 8, "and the worker goes on"
