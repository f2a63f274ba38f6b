"""A unified worker answers as `transformers` does: alone, on either side of a hand-off, resumed, handed back."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvbaton.v1 import types_pb2 as types
from support import tiny_models
from support.cluster import worker_status
from support.legs import Answer, Ask, answer_locally, hand_over

from .conftest import Unified

BLOCK = 8
CHUNK = 7
"""Divides neither a block nor most prompts."""
MAX_TOKENS = 12
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 40, 61]
PROMPTS = tiny_models.random_prompts(LENGTHS)


def ask(prompt: list[int], output: list[int] | tuple[int, ...] = (), **sampling: Any) -> Ask:
    return Ask(prompt=prompt, output=output, sampling={"max_tokens": MAX_TOKENS, **sampling})


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return tiny_models.reference_greedy(folder, PROMPTS, MAX_TOKENS, ignore_eos=True)


@pytest.fixture
async def worker(unified: Unified) -> AsyncIterator[str]:
    async with unified(max_prefill_tokens=CHUNK) as address:
        yield address


@pytest.fixture
async def other(unified: Unified) -> AsyncIterator[str]:
    async with unified(max_prefill_tokens=CHUNK, block_size=4) as address:
        yield address


async def test_prompts_in_chunks_beside_decodes(worker: str, expected: list[list[int]]) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(answer_locally(worker, ask(prompt))) for prompt in PROMPTS]
    answers = [task.result() for task in tasks]
    assert [answer.token_ids for answer in answers] == expected
    for answer in answers:
        assert answer.finish_reason == types.FINISH_REASON_LENGTH
        assert answer.admitted.ticket == b""
        assert answer.decoded is not None
        assert answer.decoded.prefill_compute_seconds > 0
        assert answer.decoded.decode_seconds > 0
    counters = (await worker_status(worker)).counters
    assert counters.kv_bytes_sent == counters.kv_bytes_received == 0
    # Each prompt's last chunk gives the first token, and the last token needs no step.
    assert counters.prefill_tokens_computed == sum(LENGTHS)
    assert counters.decode_tokens_computed == len(PROMPTS) * (MAX_TOKENS - 1)


async def test_between_two_of_them_in_both_directions(worker: str, other: str, expected: list[list[int]]) -> None:
    async with asyncio.TaskGroup() as group:
        there = [group.create_task(hand_over(worker, other, ask(prompt))) for prompt in PROMPTS]
        back = [group.create_task(hand_over(other, worker, ask(prompt))) for prompt in PROMPTS]
        alone = [group.create_task(answer_locally(worker, ask(prompt))) for prompt in PROMPTS]
    for tasks in (there, back, alone):
        assert [task.result().token_ids for task in tasks] == expected


@pytest.mark.parametrize("num_before", [1, 5, MAX_TOKENS - 1])
async def test_an_answer_goes_on_from_the_tokens_it_has(
    worker: str, other: str, expected: list[list[int]], num_before: int
) -> None:
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        resumed = ask(prompt, tokens[:num_before])
        for answer in (await answer_locally(worker, resumed), await hand_over(worker, other, resumed)):
            assert tokens[:num_before] + answer.token_ids == tokens
            assert answer.finish_reason == types.FINISH_REASON_LENGTH


async def test_one_that_runs_out_of_blocks_hands_back_and_the_answer_goes_on(folder: Path, unified: Unified) -> None:
    num_tokens = 120
    prompts = PROMPTS[-2:]
    expected = tiny_models.reference_greedy(folder, prompts, num_tokens, ignore_eos=True)

    async def ask_until_done(address: str, prompt: list[int], priority: int) -> tuple[list[int], list[Answer]]:
        output: list[int] = []
        answers: list[Answer] = []
        while not answers or answers[-1].preempted:
            asked = Ask(prompt=prompt, output=output, sampling={"max_tokens": num_tokens}, priority=priority)
            answers.append(await answer_locally(address, asked))
            output = output + answers[-1].token_ids
        return output, answers

    # Either fits, both do not.
    blocks = -(-(61 + num_tokens) // BLOCK) + 4
    geometry_bytes = 4 * tiny_models.SHAPE["num_hidden_layers"] * 2 * 2 * tiny_models.SHAPE["head_dim"]
    memory = str(blocks * BLOCK * geometry_bytes)
    async with unified(max_prefill_tokens=CHUNK, kv_memory=memory) as address:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(ask_until_done(address, prompts[0], priority=0))
            second = group.create_task(ask_until_done(address, prompts[1], priority=1))
        assert [first.result()[0], second.result()[0]] == expected
        assert [bool(answer.preempted) for answer in first.result()[1]] == [False]
        assert [bool(answer.preempted) for answer in second.result()[1]] == [True, False]
        counters = (await worker_status(address)).counters
        assert (counters.requests_preempted, counters.requests_cancelled) == (1, 0)
