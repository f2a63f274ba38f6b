"""A service that dies ends its requests quickly and cleanly: the client is told, the survivors hold nothing."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvbaton.cli.deployment import Deployment, UpConfig, deployed
from kvbaton.client import AsyncClient, GenerationResult, UnavailableError
from kvbaton.text.bundled import DEFAULT_MODEL
from support import tiny_models
from support.cluster import assert_idle, wait_for_status

LONG = 20_000
NOTICED_SECONDS = 2.0
"""How soon a client must hear of a worker's death."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=2 * LONG)


@asynccontextmanager
async def running(folder: Path | str, **options: Any) -> AsyncIterator[tuple[Deployment, AsyncClient]]:
    options = {"kv_memory": "16MiB", "max_prefill_tokens": 32, **options}
    config = UpConfig(model=str(folder), port=0, grace_seconds=0.5, **options)
    async with deployed(config, lambda *_: None) as deployment, AsyncClient(deployment.address) as client:
        yield deployment, client


@pytest.mark.parametrize("transport", ["grpc", "shared_memory"])
async def test_prefill_worker_dies_while_it_computes(folder: Path, transport: str) -> None:
    async with running(folder, transport=transport) as (deployment, client):
        prefill, decode = deployment.prefill[0], deployment.decode[0]
        generation = client.generate([5] * LONG, max_tokens=8, timeout=60)
        await wait_for_status(prefill.address, lambda s: s.counters.prefill_tokens_computed > 0)
        os.kill(prefill.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(UnavailableError, match="prefill worker"):
            await generation.result()
        assert time.monotonic() - killed_at < NOTICED_SECONDS
        await assert_idle(decode.address)
        with pytest.raises(UnavailableError, match="no prefill worker is ready"):
            await client.generate([5], max_tokens=8, timeout=60).result()


async def test_decode_worker_dies_while_it_decodes(folder: Path) -> None:
    async with running(folder) as (deployment, client):
        prefill, decode = deployment.prefill[0], deployment.decode[0]
        generation = client.generate([5, 6, 7], max_tokens=LONG, ignore_eos=True, timeout=60)
        async for chunk in generation:
            if chunk.index >= 3:
                break
        os.kill(decode.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(UnavailableError, match="decode worker"):
            await generation.result()
        assert time.monotonic() - killed_at < NOTICED_SECONDS
        await assert_idle(prefill.address)


async def test_decode_worker_dies_while_it_receives(folder: Path) -> None:
    async with running(folder, transport="grpc") as (deployment, client):
        prefill, decode = deployment.prefill[0], deployment.decode[0]
        generation = client.generate([5] * LONG, max_tokens=8, timeout=60)
        await wait_for_status(decode.address, lambda s: s.counters.kv_bytes_received > 0)
        os.kill(decode.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(UnavailableError):
            await generation.result()
        assert time.monotonic() - killed_at < NOTICED_SECONDS
        await assert_idle(prefill.address)


CROWD: list[dict[str, Any]] = [
    {"n": 4, "temperature": 1.0, "logprobs": 2},
    {"regex": "[a-z ]{600,700}", "temperature": 1.0},
    {"n": 2, "stop": ["\0"], "priority": 1},
    *[{}] * 4,
]


@pytest.mark.parametrize("victim", ["decode", "router"])
async def test_a_crowd_that_is_handed_back_and_resumed_hears_of_it(victim: str) -> None:
    # Eleven answers of 600 tokens, and room for one.
    async with running(DEFAULT_MODEL, kv_memory="1MiB") as (deployment, client):
        prefill, decode, router = deployment.prefill[0], deployment.decode[0], deployment.router
        assert router is not None

        async def ask(options: dict[str, Any]) -> GenerationResult | UnavailableError:
            ending = "regex" not in options
            generation = client.generate("The red lamp", max_tokens=600, ignore_eos=ending, timeout=60, **options)
            try:
                return await generation.result()
            except UnavailableError as error:
                return error

        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(options)) for options in CROWD]
            await wait_for_status(decode.address, lambda s: s.counters.requests_preempted >= 3)
            killed = {"decode": decode, "router": router}[victim]
            os.kill(killed.pid, signal.SIGKILL)
            _, waiting = await asyncio.wait(asked, timeout=NOTICED_SECONDS)
            assert not waiting
        assert any(isinstance(task.result(), UnavailableError) for task in asked)
        await assert_idle(*(process.address for process in (prefill, decode) if process is not killed))
