"""n answers to one prompt are n requests: the same tokens, but the prompt is computed and moved once."""

from pathlib import Path
from typing import Any

import pytest

from kvbaton.client import AsyncClient
from kvbaton.router.dispatch import SEED_STRIDE
from kvbaton.v1 import worker_pb2
from support import tiny_models
from support.cluster import Cluster, mixed_cluster, worker_status

BLOCK = 8
TAIL = 3
"""Tokens of the prompt beyond its last whole block."""
(PROMPT,) = tiny_models.random_prompts([5 * BLOCK + TAIL])
N, SEED = 4, 2**64 - 5
OPTIONS: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "ignore_eos": True, "timeout": 120}
TOKEN_BYTES = 4 * tiny_models.SHAPE["num_hidden_layers"] * 2 * 2 * tiny_models.SHAPE["head_dim"]
DEPLOYMENTS: dict[str, dict[str, Any]] = {"pair": {"prefill": {}, "decode": {}}, "unified": {"unified": {}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model("llama", tmp_path_factory.mktemp("model"))


async def counters(services: Cluster) -> tuple[worker_pb2.WorkerCounters, worker_pb2.WorkerCounters]:
    """Of the worker that prefills and of the one that decodes."""
    one, other = services.prefill or services.unified, services.decode or services.unified
    return (await worker_status(one)).counters, (await worker_status(other)).counters


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
async def test_n_answers_equal_n_requests(folder: Path, deployment: str) -> None:
    async with mixed_cluster(folder, **DEPLOYMENTS[deployment]) as services, AsyncClient(services.router) as client:
        together = await client.generate(PROMPT, n=N, seed=SEED, **OPTIONS).result()
        prefilled, decoded = await counters(services)
        # The others differ from the first in what follows the prompt's last whole block, and in nothing before it.
        assert prefilled.prefill_tokens_computed == len(PROMPT) + (N - 1) * TAIL
        if deployment == "pair":
            assert decoded.kv_bytes_received == (len(PROMPT) + (N - 1) * TAIL) * TOKEN_BYTES
            assert decoded.transfers_applied == N
        assert together.usage.completion_tokens == N * OPTIONS["max_tokens"]
        assert (together.usage.prompt_tokens, together.usage.cached_tokens) == (len(PROMPT), 0)
        alone = []
        for number in range(N):
            seed = (SEED + number * SEED_STRIDE) % 2**64
            alone.append((await client.generate(PROMPT, seed=seed, **OPTIONS).result()).token_ids)
        assert [sequence.token_ids for sequence in together.sequences] == alone
        assert len(set(alone)) == N
        assert together.seed == SEED
        await services.assert_idle()


async def test_of_a_sliding_window_they_share_what_was_moved(tmp_path: Path) -> None:
    folder = tiny_models.save_tiny_model("mistral", tmp_path)
    async with mixed_cluster(folder, prefill={}, decode={}) as services, AsyncClient(services.router) as client:
        together = await client.generate(PROMPT, n=N, seed=SEED, **OPTIONS).result()
        prefilled, decoded = await counters(services)
        assert prefilled.prefill_tokens_computed == len(PROMPT) + (N - 1) * TAIL
        # Who goes on after the last whole block sees this token's block first.
        start = (5 * BLOCK - tiny_models.WINDOW + 1) // BLOCK * BLOCK
        assert decoded.kv_bytes_received == (len(PROMPT) - start + (N - 1) * TAIL) * TOKEN_BYTES
        await services.assert_idle()
    async with mixed_cluster(folder, unified={}) as services, AsyncClient(services.router) as client:
        assert together.sequences == (await client.generate(PROMPT, n=N, seed=SEED, **OPTIONS).result()).sequences


async def test_they_are_handed_back_and_resumed_one_by_one(folder: Path) -> None:
    async with mixed_cluster(folder, **DEPLOYMENTS["unified"]) as quiet, AsyncClient(quiet.router) as client:
        expected = await client.generate(PROMPT, n=6, seed=SEED, **{**OPTIONS, "max_tokens": 60}).result()
        assert expected.num_resumes == 0
    small = {"prefill": {}, "decode": {"kv_memory": "72KiB"}}
    async with mixed_cluster(folder, **small) as services, AsyncClient(services.router) as client:
        result = await client.generate(PROMPT, n=6, seed=SEED, **{**OPTIONS, "max_tokens": 60}).result()
        assert result.num_resumes > 0
        assert result.sequences == expected.sequences
        await services.assert_idle()


async def test_a_client_that_goes_ends_all_of_them(folder: Path) -> None:
    async with mixed_cluster(folder, prefill={}, decode={}) as services, AsyncClient(services.router) as client:
        async with client.generate(PROMPT, n=N, **{**OPTIONS, "max_tokens": 200}) as generation:
            async for chunk in generation:
                if chunk.sequence == N - 1:
                    break
        await services.assert_idle()
