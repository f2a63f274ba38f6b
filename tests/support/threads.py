"""An engine's thread around a fake runner, and handles followed to their end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from kvbaton.engine.request import Route
from kvbaton.engine.result import TokenSampled
from kvbaton.engine.sampling import SamplingParams
from kvbaton.engine.scheduler import Limits
from kvbaton.worker.engine_thread import EngineThread, RequestHandle
from support.fakes import PATIENCE, FakeRunner, make_engine
from support.requests import new_request

PROMPT = [5, 6, 7, 8, 9]
NUM_BLOCKS = 8
LIMITS = Limits(max_prefill_tokens=4, max_decode_seqs=4, max_waiting=2)


def sampling(max_tokens: int = 4) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True)


@asynccontextmanager
async def running(runner: FakeRunner, limits: Limits = LIMITS) -> AsyncIterator[EngineThread]:
    engine = make_engine(runner, limits, NUM_BLOCKS)
    async with asyncio.timeout(PATIENCE):
        with EngineThread(engine, asyncio.get_running_loop()) as thread:
            yield thread


def submit(
    thread: EngineThread, handle: RequestHandle, prompt: list[int], params: SamplingParams, route: Route, **more: Any
) -> None:
    thread.submit(handle, new_request(handle.request_id, prompt, params, route, **more))


async def collect(handle: RequestHandle) -> list[TokenSampled]:
    tokens: list[TokenSampled] = []
    while not tokens or tokens[-1].finish_reason is None:
        tokens += await handle.next_tokens()
    return tokens
