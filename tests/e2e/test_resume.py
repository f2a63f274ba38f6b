"""Answers that a worker handed back for lack of blocks: their tokens are those of a quiet run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvbaton.client import AsyncClient, GenerationResult
from support import tiny_models
from support.cluster import Cluster, mixed_cluster, worker_status

SMALL_POOL = "72KiB"
"""24 blocks of 8 tokens: room for two and a half of the answers below."""
MAX_TOKENS = 60
PROMPTS = tiny_models.random_prompts([5, 8, 17, 20, 1, 24])
GREEDY: dict[str, Any] = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "timeout": 120}
SAMPLED: dict[str, Any] = {**GREEDY, "temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.25}

DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "pair": {"prefill": {}, "decode": {"kv_memory": SMALL_POOL}},
    "unified": {"unified": {"kv_memory": SMALL_POOL, "max_prefill_tokens": 7}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def crowded(folder: Path, deployment: str) -> AsyncIterator[tuple[Cluster, AsyncClient]]:
    """A deployment that cannot hold all the answers; it must have handed some back, and hold nothing at the end."""
    async with mixed_cluster(folder, **DEPLOYMENTS[deployment]) as services, AsyncClient(services.router) as client:
        yield services, client
        await services.assert_idle()
        counters = (await worker_status(services.decode or services.unified)).counters
        assert counters.requests_preempted > 0


async def ask_all(client: AsyncClient, options: dict[str, Any]) -> list[GenerationResult]:
    async with asyncio.TaskGroup() as group:
        asked = [
            group.create_task(client.generate(prompt, seed=number, **options).result())
            for number, prompt in enumerate(PROMPTS)
        ]
    return [task.result() for task in asked]


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
async def test_greedy_answers_equal_transformers(folder: Path, deployment: str) -> None:
    async with crowded(folder, deployment) as (_, client):
        results = await ask_all(client, GREEDY)
    expected = tiny_models.reference_greedy(folder, PROMPTS, MAX_TOKENS, ignore_eos=True)
    assert [list(result.token_ids) for result in results] == expected
    assert sum(result.num_resumes for result in results) > 0
    assert [result.usage.completion_tokens for result in results] == [MAX_TOKENS] * len(PROMPTS)


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
async def test_sampled_answers_equal_those_of_a_quiet_run(folder: Path, deployment: str) -> None:
    async with mixed_cluster(folder, prefill={}, decode={}) as quiet, AsyncClient(quiet.router) as client:
        expected = await ask_all(client, SAMPLED)
        assert [result.num_resumes for result in expected] == [0] * len(PROMPTS)
    async with crowded(folder, deployment) as (_, client):
        results = await ask_all(client, SAMPLED)
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert sum(result.num_resumes for result in results) > 0


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
async def test_the_important_one_is_not_handed_back(folder: Path, deployment: str) -> None:
    async with crowded(folder, deployment) as (_, client):

        async def ask(number: int, priority: int) -> int:
            generation = client.generate(PROMPTS[number], priority=priority, **GREEDY)
            return (await generation.result()).num_resumes

        async with asyncio.TaskGroup() as group:
            others = [group.create_task(ask(number, 0)) for number in range(1, len(PROMPTS))]
            important = group.create_task(ask(0, -1))
        assert important.result() == 0
        assert sum(task.result() for task in others) > 0


async def test_clients_that_go_while_their_requests_are_to_and_fro_leave_nothing(folder: Path) -> None:
    async with crowded(folder, "pair") as (services, client):
        generations = [client.generate(prompt, **GREEDY) for prompt in PROMPTS * 2]

        async def read_some(number: int) -> None:
            async for chunk in generations[number]:
                if chunk.index >= 4 * number:
                    break
            await generations[number].aclose()

        async with asyncio.TaskGroup() as group:
            for number in range(len(generations)):
                group.create_task(read_some(number))
        await services.assert_idle()
