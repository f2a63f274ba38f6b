"""Logits that are no numbers end their own request, with an error that says so, and nothing else."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from kvbaton.client import AsyncClient, ServiceError
from support import tiny_models
from support.cluster import Cluster, mixed_cluster, worker_status

POISON = 96
"""A token whose embedding is not a number."""
MAX_TOKENS = 12
OPTIONS: dict[str, Any] = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "timeout": 120}
PROMPTS = [[token % POISON for token in prompt] for prompt in tiny_models.random_prompts([3, 12, 21, 30])]
# Sixteen blocks: what a poisoned request has left is soon written over by others.
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "pair": {"prefill": {"kv_memory": "48KiB"}, "decode": {"kv_memory": "48KiB"}},
    "unified": {"unified": {"kv_memory": "48KiB", "max_prefill_tokens": 9}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save_tiny_model("llama", tmp_path_factory.mktemp("model"))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


async def num_failed(services: Cluster) -> int:
    addresses = [address for address in (services.prefill, services.decode, services.unified) if address]
    return sum([(await worker_status(address)).counters.requests_not_a_number for address in addresses])


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
async def test_it_ends_that_request_alone(folder: Path, deployment: str) -> None:
    expected = tiny_models.reference_greedy(folder, PROMPTS, MAX_TOKENS, ignore_eos=True)
    assert not any(POISON in tokens for tokens in expected)
    async with mixed_cluster(folder, **DEPLOYMENTS[deployment]) as services, AsyncClient(services.router) as client:

        async def ask(prompt: list[int]) -> list[int]:
            return list((await client.generate(prompt, **OPTIONS).result()).token_ids)

        async def fail(prompt: list[int], **options: Any) -> None:
            with pytest.raises(ServiceError, match=r"the logits of token \d+ are not numbers"):
                await client.generate(prompt, **{**OPTIONS, **options}).result()

        for _ in range(3):
            async with asyncio.TaskGroup() as group:
                # The one fails with its prompt, the other as soon as it decodes.
                group.create_task(fail([*PROMPTS[3], POISON, 5, 6]))
                group.create_task(fail(PROMPTS[2], allowed_token_ids=[POISON]))
                answers = [group.create_task(ask(prompt)) for prompt in PROMPTS]
            assert [task.result() for task in answers] == expected
        assert await num_failed(services) == 6
        await services.assert_idle()
