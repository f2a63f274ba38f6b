"""A unified worker becomes a prefill worker and is one no more, while requests run."""

import asyncio

from kvbaton.rpc.serving import channel
from kvbaton.v1 import worker_pb2 as pb
from kvbaton.v1.worker_pb2_grpc import WorkerServiceStub
from support import tiny_models
from support.cluster import wait_for_status, worker_status
from support.legs import Ask, answer_locally, hand_over

from .conftest import Unified

MAX_TOKENS = 300
PROMPT, OTHER = tiny_models.random_prompts([30, 40])


async def set_limits(worker: str, **limits: int) -> pb.EngineLimits:
    async with channel(worker) as opened:
        answer = await WorkerServiceStub(opened).SetLimits(pb.SetLimitsRequest(**limits))
    return answer.limits


async def test_prefill_only_and_back_while_requests_run(unified: Unified) -> None:
    long = Ask(prompt=PROMPT, sampling={"max_tokens": MAX_TOKENS})
    async with unified(max_prefill_tokens=16) as worker, unified(max_prefill_tokens=16) as other:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(answer_locally(worker, long))
            await wait_for_status(worker, lambda s: s.counters.decode_tokens_computed > 5)
            limits = await set_limits(worker, max_decode_seqs=0)
            assert (limits.max_prefill_tokens, limits.max_decode_seqs) == (16, 0)
            assert (await worker_status(worker)).limits == limits
        before = running.result()
        assert before.preempted == "this worker does not decode any more"
        assert 0 < len(before.token_ids) < MAX_TOKENS
        # It prefills for others, which go on with what it gave back.
        resumed = Ask(prompt=PROMPT, output=before.token_ids, sampling={"max_tokens": MAX_TOKENS})
        after = await hand_over(worker, other, resumed)
        handed = await hand_over(worker, other, Ask(prompt=OTHER))
        assert (await answer_locally(worker, Ask(prompt=OTHER))).preempted == "this worker does not decode at present"
        await set_limits(worker, max_decode_seqs=4)
        whole, local = await answer_locally(worker, long), await answer_locally(worker, Ask(prompt=OTHER))
        assert before.token_ids + after.token_ids == whole.token_ids
        assert handed.token_ids == local.token_ids


async def test_decode_only_and_back(unified: Unified) -> None:
    async with unified(max_prefill_tokens=16) as worker, unified() as other:
        async with asyncio.TaskGroup() as group:
            decoding = group.create_task(
                answer_locally(worker, Ask(prompt=PROMPT, sampling={"max_tokens": MAX_TOKENS}))
            )
            await wait_for_status(worker, lambda s: s.queues.num_decoding == 1)
            await set_limits(worker, max_prefill_tokens=0)
            refused = await answer_locally(worker, Ask(prompt=OTHER))
            assert refused.preempted == "this worker computes no prompts at present"
            received = await hand_over(other, worker, Ask(prompt=OTHER))
        assert len(decoding.result().token_ids) == MAX_TOKENS
        await set_limits(worker, max_prefill_tokens=8)
        assert (await answer_locally(worker, Ask(prompt=OTHER))).token_ids == received.token_ids
