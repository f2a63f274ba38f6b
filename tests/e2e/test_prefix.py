"""A conversation's next turn finds what the last one left, in prompt and answer; a salt keeps strangers out."""

from pathlib import Path
from typing import Any

import pytest

from kvbaton.client import AsyncClient
from support import tiny_models
from support.cluster import mixed_cluster, worker_status

BLOCK = 8
NUM_TOKENS = 2 * BLOCK + 2
FIRST, SECOND = tiny_models.random_prompts([3 * BLOCK + 3, BLOCK + 1])
TOKEN_BYTES = 4 * tiny_models.SHAPE["num_hidden_layers"] * 2 * 2 * tiny_models.SHAPE["head_dim"]
OPTIONS: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "timeout": 120}
DEPLOYMENTS: dict[str, dict[str, Any]] = {"pair": {"prefill": {}, "decode": {}}, "unified": {"unified": {}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))


def whole_blocks(num_tokens: int) -> int:
    return num_tokens // BLOCK * BLOCK


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
async def test_the_next_turn_computes_what_is_new(folder: Path, deployment: str) -> None:
    async with mixed_cluster(folder, **DEPLOYMENTS[deployment]) as services, AsyncClient(services.router) as client:
        first = await client.generate(FIRST, **OPTIONS).result()
        assert first.usage.cached_tokens == 0
        computes = services.prefill or services.unified
        before = (await worker_status(computes)).counters.prefill_tokens_computed
        prompt = [*FIRST, *first.token_ids, *SECOND]
        second = await client.generate(prompt, **OPTIONS).result()
        # The prefill worker has seen the prompt, a unified one its own answer, too: but for its last token.
        known = FIRST if deployment == "pair" else [*FIRST, *first.token_ids[:-1]]
        assert second.usage.cached_tokens == whole_blocks(len(known))
        computed = (await worker_status(computes)).counters.prefill_tokens_computed - before
        assert computed == len(prompt) - second.usage.cached_tokens
        assert [list(second.token_ids)] == tiny_models.reference_greedy(folder, [prompt], NUM_TOKENS, ignore_eos=True)
        await services.assert_idle()


async def test_the_same_prompt_is_never_found_whole(folder: Path) -> None:
    prompt = FIRST[: 3 * BLOCK]
    async with mixed_cluster(folder, unified={}) as services, AsyncClient(services.router) as client:
        results = [await client.generate(prompt, **OPTIONS).result() for _ in range(2)]
        assert [result.usage.cached_tokens for result in results] == [0, 2 * BLOCK]
        assert results[0].token_ids == results[1].token_ids


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
async def test_a_salt_isolates(folder: Path, deployment: str) -> None:
    async with mixed_cluster(folder, **DEPLOYMENTS[deployment]) as services, AsyncClient(services.router) as client:
        cached, tokens = [], []
        for salt in ("", "one", "other", "one", ""):
            result = await client.generate(FIRST, cache_salt=salt, **OPTIONS).result()
            cached.append(result.usage.cached_tokens)
            tokens.append(result.token_ids)
        assert cached == [0, 0, 0, whole_blocks(len(FIRST)), whole_blocks(len(FIRST))]
        assert len(set(tokens)) == 1


async def test_prompt_logprobs_leave_the_cache_aside(folder: Path) -> None:
    async with mixed_cluster(folder, prefill={}, decode={}) as services, AsyncClient(services.router) as client:
        await client.generate(FIRST, **OPTIONS).result()
        result = await client.generate(FIRST, prompt_logprobs=0, **OPTIONS).result()
        assert result.usage.cached_tokens == 0
        assert len(result.prompt_logprobs) == len(FIRST) - 1
        # The decode worker's cache is used all the same: only the rest moved.
        assert result.timings.transfer.payload_bytes == (len(FIRST) - whole_blocks(len(FIRST))) * TOKEN_BYTES
