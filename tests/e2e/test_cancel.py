"""A client that goes away, at any step of a request's life, leaves no block held anywhere within a second."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvbaton.client import AsyncClient, AsyncGeneration, DeadlineExceededError
from kvbaton.handoff.frames import Rectangle
from kvbaton.handoff.sender import OutgoingTransfer
from support import tiny_models
from support.cluster import Cluster, cluster, wait_for_status

LONG = 20_000
"""Tokens that take far longer than any test looks at them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=2 * LONG)


@pytest.fixture
async def running(folder: Path) -> AsyncIterator[Cluster]:
    # Room for one long request and a little more; prompts in small chunks, so that long ones take long.
    blocks = {"kv_memory": "12MiB"}
    async with cluster(folder, prefill={"max_prefill_tokens": 32, **blocks}, decode=blocks) as services:
        yield services


@pytest.fixture
async def client(running: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(running.router) as connected:
        yield connected


def ask_long_answer(client: AsyncClient) -> AsyncGeneration:
    return client.generate([5, 6, 7], max_tokens=LONG, ignore_eos=True)


def ask_long_prompt(client: AsyncClient) -> AsyncGeneration:
    return client.generate([5] * LONG, max_tokens=8, ignore_eos=True)


async def test_while_it_waits_for_blocks_on_decode(running: Cluster, client: AsyncClient) -> None:
    first = ask_long_prompt(client)
    await wait_for_status(running.decode, lambda s: s.queues.num_receiving == 1)
    second = client.generate([6] * LONG, max_tokens=8)
    await wait_for_status(running.decode, lambda s: s.queues.num_waiting == 1)
    await second.aclose()
    status = await wait_for_status(running.decode, lambda s: s.queues.num_waiting == 0)
    assert status.queues.num_receiving == 1, "the other request goes on"
    await first.aclose()
    await running.assert_idle()


async def test_while_it_waits_for_prefill(running: Cluster, client: AsyncClient) -> None:
    first = ask_long_prompt(client)
    await wait_for_status(running.prefill, lambda s: s.queues.num_prefilling == 1)
    # Long enough to be seen while it waits: short prompts pass long ones.
    second = client.generate([6] * (LONG // 2), max_tokens=8)
    await wait_for_status(running.decode, lambda s: s.queues.num_receiving == 2)
    await second.aclose()
    await wait_for_status(running.decode, lambda s: s.queues.num_receiving == 1)
    await first.aclose()
    await running.assert_idle()


async def test_while_its_prompt_is_computed_and_its_kv_sent(running: Cluster, client: AsyncClient) -> None:
    generation = ask_long_prompt(client)
    await wait_for_status(running.decode, lambda s: s.counters.kv_bytes_received > 0)
    await generation.aclose()
    await running.assert_idle()
    status = await wait_for_status(running.prefill, lambda s: s.counters.requests_cancelled == 1)
    assert status.counters.prefill_tokens_computed < LONG, "the rest of the prompt is not computed"


async def test_between_first_token_and_complete_kv(
    running: Cluster, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OutgoingTransfer.next

    async def never_done(self: OutgoingTransfer) -> Rectangle | None:
        rectangle = await original(self)
        if rectangle is None:
            await asyncio.Event().wait()
        return rectangle

    monkeypatch.setattr(OutgoingTransfer, "next", never_done)
    generation = client.generate([5] * 40, max_tokens=8)
    chunk = await anext(generation)
    assert chunk.index == 0
    await wait_for_status(running.prefill, lambda s: s.queues.num_handing_off == 1)
    await wait_for_status(running.decode, lambda s: s.queues.num_receiving == 1)
    await generation.aclose()
    await running.assert_idle()


async def test_while_tokens_stream(running: Cluster, client: AsyncClient) -> None:
    generation = ask_long_answer(client)
    async for chunk in generation:
        if chunk.index >= 5:
            break
    await generation.aclose()
    await running.assert_idle()


async def test_by_deadline(running: Cluster, client: AsyncClient) -> None:
    generation = client.generate([5, 6, 7], max_tokens=LONG, ignore_eos=True, timeout=0.5)
    with pytest.raises(DeadlineExceededError):
        await generation.result()
    await running.assert_idle()


async def test_at_any_moment(running: Cluster, client: AsyncClient) -> None:
    rng = random.Random(4)

    async def ask_and_leave(delay: float, length: int) -> None:
        generation = client.generate([5] * length, max_tokens=64, ignore_eos=True)
        await asyncio.sleep(delay)
        await generation.aclose()

    async with asyncio.TaskGroup() as group:
        for _ in range(120):
            group.create_task(ask_and_leave(rng.uniform(0, 0.6), rng.randint(1, 200)))
    await running.assert_idle()
    result = await client.generate([5, 6, 7], max_tokens=4, ignore_eos=True).result()
    assert len(result.token_ids) == 4, "and the service goes on"
    await running.assert_idle()
