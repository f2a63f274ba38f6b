"""Three real processes answer as `transformers` does alone, token for token, and the KV really moves between them."""

import asyncio
from pathlib import Path

import pytest

from kvbaton.cli.deployment import UpConfig, deployed
from kvbaton.client import AsyncClient
from kvbaton.engine.windows import window_start
from kvbaton.v1 import worker_pb2
from support import tiny_models
from support.cluster import assert_idle, worker_status

BLOCK = 8
CHUNK = 16
MAX_TOKENS = 12
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * CHUNK + 5, 61]


def ignore_line(name: str, line: str) -> None:
    """Log lines matter to people only."""


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3", "mixtral"])
async def test_greedy_answers_equal_transformers(architecture: str, tmp_path: Path) -> None:
    folder = tiny_models.save_tiny_model(architecture, tmp_path)
    prompts = tiny_models.random_prompts(LENGTHS)
    config = UpConfig(
        model=str(folder), port=0, dtype="float32", block_size=BLOCK, kv_memory="4MiB", max_prefill_tokens=CHUNK
    )
    async with deployed(config, ignore_line) as deployment, AsyncClient(deployment.address) as client:

        async def ask(prompt: list[int], ignore_eos: bool) -> list[int]:
            options = {"max_tokens": MAX_TOKENS, "ignore_eos": ignore_eos, "timeout": 60}
            result = await client.generate(prompt, **options).result()  # type: ignore[arg-type]
            return list(result.token_ids)

        for ignore_eos in (True, False):
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask(prompt, ignore_eos)) for prompt in prompts]
            expected = tiny_models.reference_greedy(folder, prompts, MAX_TOKENS, ignore_eos)
            assert [task.result() for task in tasks] == expected
        first, second = deployment.prefill[0].address, deployment.decode[0].address
        await assert_idle(first, second)
        sender, receiver = await worker_status(first), await worker_status(second)
    check_counters(sender, receiver)


def check_counters(sender: worker_pb2.WorkerStatus, receiver: worker_pb2.WorkerStatus) -> None:
    # The second time, both workers have the prompts' full blocks, without the last token's, in their prefix caches.
    lacked = [range(length) for length in LENGTHS] + [range((n - 1) // BLOCK * BLOCK, n) for n in LENGTHS]
    num_bytes = 0
    for group in sender.model.kv_geometry.layer_groups:
        token_bytes = 4 * group.num_layers * group.num_kv_heads * (group.k_head_dim + group.v_head_dim)
        num_tokens = sum(tokens.stop - window_start(group.window or None, tokens, BLOCK) for tokens in lacked)
        num_bytes += num_tokens * token_bytes
    assert 0 < num_bytes == receiver.counters.kv_bytes_received == sender.counters.kv_bytes_sent
    assert receiver.counters.transfers_applied == len(lacked)
    assert sender.counters.prefill_tokens_computed == sum(map(len, lacked))
    assert receiver.counters.prefill_tokens_computed == 0
    assert sender.counters.decode_tokens_computed == 0
    assert receiver.counters.decode_tokens_computed > 0
