"""Prefix caches of workers, counted by what was computed and by the bytes that moved."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvbaton.v1 import worker_pb2
from support import tiny_models
from support.cluster import worker_status
from support.legs import Ask, answer_locally, hand_over

from .conftest import Unified

BLOCK = 8
TURN = 3 * BLOCK + 3
NUM_TOKENS = 2 * BLOCK + 2
PROMPT = tiny_models.random_prompts([TURN])[0]
FOLLOW_UP = tiny_models.random_prompts([TURN], seed=5)[0]
TOKEN_BYTES = 4 * tiny_models.SHAPE["num_hidden_layers"] * 2 * 2 * tiny_models.SHAPE["head_dim"]


@pytest.fixture
async def pair(unified: Unified) -> AsyncIterator[tuple[str, str]]:
    async with unified() as first, unified() as second:
        yield first, second


def ask(prompt: list[int], salt: str = "") -> Ask:
    return Ask(prompt=prompt, sampling={"max_tokens": NUM_TOKENS}, cache_salt=salt)


async def counters(address: str) -> worker_pb2.WorkerCounters:
    return (await worker_status(address)).counters


async def test_a_second_turn_moves_and_computes_only_what_is_new(folder: Path, pair: tuple[str, str]) -> None:
    prefill, decode = pair
    first = await hand_over(prefill, decode, ask(PROMPT))
    sent, received = await counters(prefill), await counters(decode)
    assert received.kv_bytes_received == sent.kv_bytes_sent == TURN * TOKEN_BYTES
    second_prompt = PROMPT + first.token_ids + FOLLOW_UP
    second = await hand_over(prefill, decode, ask(second_prompt))
    assert [second.token_ids] == tiny_models.reference_greedy(folder, [second_prompt], NUM_TOKENS, True)
    # The decode worker has the whole conversation but its last token, whose KV nobody needed; the prefill worker the
    # prompt. Both have whole blocks only.
    on_decode = (TURN + NUM_TOKENS - 1) // BLOCK * BLOCK
    on_prefill = TURN // BLOCK * BLOCK
    assert second.admitted.num_cached_tokens == on_decode
    assert second.prefilled is not None
    assert second.decoded is not None
    assert (second.prefilled.cached_tokens, second.decoded.cached_tokens) == (on_prefill, on_decode)
    assert second.prefilled.transfer.payload_bytes == (len(second_prompt) - on_decode) * TOKEN_BYTES
    after, there = await counters(prefill), await counters(decode)
    assert there.kv_bytes_received - received.kv_bytes_received == (len(second_prompt) - on_decode) * TOKEN_BYTES
    assert after.prefill_tokens_computed - sent.prefill_tokens_computed == len(second_prompt) - on_prefill
    assert after.prefix_tokens_hit == on_prefill
    assert there.prefix_tokens_hit == on_decode
    assert there.prefix_tokens_queried >= on_decode


async def test_what_only_the_prefill_worker_has_is_sent_from_its_cache(folder: Path, pair: tuple[str, str]) -> None:
    prefill, decode = pair
    first = await answer_locally(prefill, ask(PROMPT))
    before = await counters(prefill)
    again = await hand_over(prefill, decode, ask(PROMPT))
    assert again.token_ids == first.token_ids
    after = await counters(prefill)
    cached = TURN // BLOCK * BLOCK
    assert after.prefill_tokens_computed - before.prefill_tokens_computed == TURN - cached
    assert again.admitted.num_cached_tokens == 0
    assert after.kv_bytes_sent == TURN * TOKEN_BYTES, "the cached tokens' KV, too"


async def test_a_local_second_turn_finds_prompt_and_answer(pair: tuple[str, str]) -> None:
    worker, _ = pair
    first = await answer_locally(worker, ask(PROMPT))
    second = await answer_locally(worker, ask(PROMPT + first.token_ids + FOLLOW_UP))
    assert second.decoded is not None
    assert second.decoded.cached_tokens == (TURN + NUM_TOKENS - 1) // BLOCK * BLOCK
    assert (await worker_status(worker)).pool.num_cached_blocks > 0


async def test_salts_share_nothing(pair: tuple[str, str]) -> None:
    worker, _ = pair
    for salt in ("a", "b", ""):
        answer = await answer_locally(worker, ask(PROMPT, salt))
        assert answer.decoded is not None
        assert answer.decoded.cached_tokens == 0
    again = await answer_locally(worker, ask(PROMPT, "b"))
    assert again.decoded is not None
    assert again.decoded.cached_tokens == TURN // BLOCK * BLOCK


async def test_the_part_of_a_resumed_answer_is_not_counted_as_prompt(pair: tuple[str, str]) -> None:
    worker, _ = pair
    first = await answer_locally(worker, ask(PROMPT))
    resumed = Ask(prompt=PROMPT, output=first.token_ids[:-1], sampling={"max_tokens": NUM_TOKENS})
    answer = await answer_locally(worker, resumed)
    assert answer.token_ids == first.token_ids[-1:]
    assert answer.admitted.num_cached_tokens > TURN
    assert answer.decoded is not None
    assert answer.decoded.cached_tokens == TURN
