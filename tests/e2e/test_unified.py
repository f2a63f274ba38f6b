"""Workers that serve both legs: alone, beside a pair, and in another role after a change of their limits."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvbaton.cli.deployment import UpConfig, deployed
from kvbaton.cli.limits import run_limits
from kvbaton.client import AsyncClient, GenerationResult, UnavailableError
from support import tiny_models
from support.cluster import assert_idle, mixed_cluster, wait_for_status, worker_status

MAX_TOKENS = 12
PROMPTS = tiny_models.random_prompts([1, 7, 8, 9, 53, 61])
OPTIONS: dict[str, Any] = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "timeout": 120}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model("llama", tmp_path_factory.mktemp("model"))


async def ask_all(client: AsyncClient, prompts: list[list[int]] = PROMPTS) -> list[GenerationResult]:
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(client.generate(prompt, **OPTIONS).result()) for prompt in prompts]
    return [task.result() for task in asked]


def check(folder: Path, results: list[GenerationResult]) -> None:
    expected = tiny_models.reference_greedy(folder, PROMPTS, MAX_TOKENS, ignore_eos=True)
    assert [list(result.token_ids) for result in results] == expected


async def test_a_deployment_of_unified_workers_alone(folder: Path) -> None:
    config = UpConfig(
        model=str(folder), port=0, prefill=0, decode=0, unified=1, dtype="float32", block_size=8, kv_memory="4MiB"
    )
    async with deployed(config, lambda *_: None) as deployment, AsyncClient(deployment.address) as client:
        results = await ask_all(client)
        address = deployment.unified[0].address
        await assert_idle(address)
        counters = (await worker_status(address)).counters
    check(folder, results)
    assert {(result.prefill_worker, result.decode_worker) for result in results} == {(address, address)}
    assert not any(result.timings.HasField("transfer") for result in results)
    assert (counters.kv_bytes_sent, counters.kv_bytes_received) == (0, 0)
    assert counters.prefill_tokens_computed == sum(map(len, PROMPTS))


async def test_beside_a_pair_it_takes_its_share(folder: Path) -> None:
    async with mixed_cluster(folder, prefill={}, decode={}, unified={}) as services:
        async with AsyncClient(services.router) as client:
            results = await ask_all(client)
        check(folder, results)
        used = {(result.prefill_worker, result.decode_worker) for result in results}
        local = (services.unified, services.unified)
        assert local in used
        assert used - {local} <= {(first, services.decode) for first in (services.prefill, services.unified)}
        assert len(used) > 1
        await services.assert_idle()


async def test_its_role_changes_while_it_runs(folder: Path) -> None:
    async with mixed_cluster(folder, prefill={}, unified={}) as services, AsyncClient(services.router) as client:

        async def set_limits(**limits: int) -> None:
            assert await run_limits(services.unified, limits, as_json=True) == 0

        async def served_by() -> tuple[str, str] | None:
            """Prefill and decode worker of an answer; None where there was none."""
            try:
                result = await client.generate(PROMPTS[3], **OPTIONS).result()
            except UnavailableError:
                return None
            assert list(result.token_ids) == expected
            return result.prefill_worker, result.decode_worker

        async def until_served_by(workers: tuple[str, str] | None) -> None:
            """The router hears of new limits with the worker's next report, and until then a request may be refused."""
            async with asyncio.timeout(30):
                while await served_by() != workers:
                    await asyncio.sleep(0.05)

        (expected,) = tiny_models.reference_greedy(folder, [PROMPTS[3]], MAX_TOKENS, ignore_eos=True)
        await until_served_by((services.unified, services.unified))
        await set_limits(max_prefill_tokens=0)
        await until_served_by((services.prefill, services.unified))
        await set_limits(max_prefill_tokens=64, max_decode_seqs=0)
        await until_served_by(None)
        while await client.models():
            await asyncio.sleep(0.05)
        await set_limits(max_decode_seqs=8)
        await until_served_by((services.unified, services.unified))
        await services.assert_idle()


async def test_what_it_answers_goes_on_elsewhere_when_it_decodes_no_more(folder: Path) -> None:
    options = {**OPTIONS, "max_tokens": 150}
    async with mixed_cluster(folder, prefill={}, decode={}, unified={}) as services:
        async with AsyncClient(services.router) as client, asyncio.TaskGroup() as group:
            asked = [group.create_task(client.generate(prompt, **options).result()) for prompt in PROMPTS]
            await wait_for_status(services.unified, lambda status: status.queues.num_decoding >= 2)
            assert await run_limits(services.unified, {"max_decode_seqs": 0}, as_json=True) == 0
        await services.assert_idle()
    results = [task.result() for task in asked]
    expected = tiny_models.reference_greedy(folder, PROMPTS, 150, ignore_eos=True)
    assert [list(result.token_ids) for result in results] == expected
    assert sum(result.num_resumes > 0 for result in results) >= 2
